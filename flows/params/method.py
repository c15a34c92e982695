"""Sections `method` and `quantization` of params.yaml: the adapter, and the storage of the frozen base."""

import re
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from flows.params.file import suggest
from flows.params.method_fields import FIELDS, SHARED, missing_option
from flows.params.section import Count, Positive, Section, Share, Text, Whole, invalid_value
from peftcore import tuner_names

LORA_DEFAULTS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
"""LoRA's options if params.yaml does not give them; other methods have the defaults of their configurations."""


class AutoRank(Section):
    """Search for each layer's rank, used if `method.r` is auto."""

    r: Count = 16
    tolerance: Positive | None = None
    least: Whole = 1
    steps: Count = 8
    held_out: Count = 4


class Schedule(Section):
    """Schedule of the methods that reduce their ranks during a run; other methods ignore it."""

    warmup_share: Share = 0.1
    final_share: Share = 0.3

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.warmup_share + self.final_share >= 1:
            raise invalid_value("warmup_share + final_share must be below 1", "final_share", self.final_share)
        return self


class Method(Section):
    """Adapter method and its options."""

    renamed: ClassVar = {
        "adalora": "method.schedule (warmup_share, final_share) and method.options (init_r, target_r, deltaT, ...)"
    }

    name: Text = "lora"
    target_modules: Literal["all-linear"] | str | list[str] | None = "all-linear"
    r: int | Literal["auto"] | None = None
    auto: AutoRank = AutoRank()
    lora_alpha: Positive | None = None
    lora_dropout: Share | None = None
    use_rslora: bool = False
    init: Literal["auto", "default", "loftq", "qera", "cloq"] = "auto"
    schedule: Schedule = Schedule()
    options: dict[str, Any] = Field(default={})

    @model_validator(mode="before")
    @classmethod
    def _lora_defaults(cls, values: Any) -> Any:
        is_lora = isinstance(values, dict) and values.get("name", "lora") == "lora"
        return {**LORA_DEFAULTS, **values} if is_lora else values

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        known = [tuner.lower() for tuner in tuner_names()]
        if name not in known:
            raise invalid_value(suggest(name, known, "give one of "))
        return name

    @field_validator("r", mode="plain")
    @classmethod
    def _check_rank(cls, r: Any) -> int | str | None:
        if r not in ("auto", None) and (isinstance(r, bool) or not isinstance(r, int) or r < 1):
            raise invalid_value("give a whole number of at least 1, or auto")
        return r

    @field_validator(*SHARED, mode="after")
    @classmethod
    def _check_method_has_option(cls, value: Any, info: ValidationInfo) -> Any:
        name, option = info.data.get("name"), str(info.field_name)
        if name is None or value in ("auto", None):  # an invalid name is an error itself; auto is checked below
            return value
        if advice := missing_option(name, option, value):
            raise invalid_value(advice)
        return value

    @field_validator("use_rslora")
    @classmethod
    def _check_rslora(cls, use_rslora: bool, info: ValidationInfo) -> bool:
        if use_rslora and info.data.get("name", "lora") != "lora":
            raise invalid_value(f"{info.data['name']} has no such option; give false")
        return use_rslora

    @field_validator("init")
    @classmethod
    def _check_init(cls, init: str, info: ValidationInfo) -> str:
        if init not in ("auto", "default") and info.data.get("name", "lora") != "lora":
            raise invalid_value(f"{info.data['name']} has no such start; give default")
        return init

    @field_validator("target_modules", mode="plain")
    @classmethod
    def _check_target_modules(cls, value: Any) -> str | list[str] | None:
        names = isinstance(value, list) and value and all(isinstance(name, str) and name for name in value)
        if value is None or names:
            return value
        expected = "give all-linear, module names such as [q_proj, v_proj], a pattern such as '.*_proj', or null"
        if value == "all-linear":
            return value
        if not isinstance(value, str) or value == re.escape(value).replace("\\-", "-"):  # a word is no pattern
            raise invalid_value(expected)
        try:
            re.compile(value)
        except re.error as error:
            raise invalid_value(f"{expected}; this is no regular expression: {error}") from error
        return value

    @model_validator(mode="after")
    def _check_auto_rank(self) -> Self:
        if self.r == "auto" and self.name != "lora":
            rank = "a number" if "r" in FIELDS.get(self.name, {}) else "null"
            raise invalid_value(f"ranks are searched for lora only; give {self.name} {rank}", "r", self.r)
        return self

    @model_validator(mode="after")
    def _check_option_is_given_once(self) -> Self:
        option = self.options.get("init_lora_weights", self.init)
        if self.init not in ("auto", "default", option):
            raise invalid_value(
                f"method.init is {self.init}, which is the same option; leave it out here",
                "options.init_lora_weights",
                option,
            )
        for option, field in FIELDS.get(self.name, {}).items():
            value = getattr(self, option)
            if option in self.model_fields_set and value is not None and self.options.get(field, value) != value:
                raise invalid_value(
                    f"method.{option} is {value}, which is the same option; leave it out here",
                    f"options.{field}",
                    self.options[field],
                )
        return self


class Calibration(Section):
    """Rounding of the quantised base on training rows, before training."""

    method: Literal["none", "rounding"] = "none"
    rows: Count = 256
    damping: Positive = 0.01


CALIBRATED_STORAGES = ("nf4", "fp4", "int8")
"""Storages of bitsandbytes, whose packed format transformers saves and loads."""


class Quantization(Section):
    """Storage of the frozen base's weights."""

    storage: Literal["nf4", "fp4", "int8", "gguf", "torchao_int8", "hqq4", "none"] = "nf4"
    double_quant: bool = True
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    calibration: Calibration = Calibration()

    @property
    def is_calibrated(self) -> bool:
        """True if the base is rounded on training rows."""
        return self.calibration.method != "none"

    @property
    def uncalibrated(self) -> "Quantization":
        """These parameters with calibration switched off."""
        return self.model_copy(update={"calibration": Calibration()})

    @model_validator(mode="after")
    def _check_calibration(self) -> Self:
        if self.is_calibrated and self.storage not in CALIBRATED_STORAGES:
            reason = {
                "none": "its weights are not rounded",
                "gguf": "its file has no weights from before the quantisation",
            }.get(self.storage, "it cannot be saved after the calibration")
            raise invalid_value(
                f"quantization.storage is {self.storage}: {reason}; give none, or storage "
                f"{', '.join(CALIBRATED_STORAGES[:-1])} or {CALIBRATED_STORAGES[-1]}",
                "calibration.method",
                self.calibration.method,
            )
        return self
