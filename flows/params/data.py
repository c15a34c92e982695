"""Section `data` of params.yaml: the rows, their format, and their split into train, validation and test."""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from flows.params.section import HUB, Confidence, Count, Positive, Section, Share, Text, invalid_value

DEMONSTRATION = "stdlib:docstrings"
DEMONSTRATION_PROMPT = "You write the one-line summary of Python functions."
"""The default `data.system_prompt` of the demonstration; other sources have none."""
OF_TURNS = {"supervise": "all", "reasoning": "all", "ignored_fields": [], "system_prompt": None}
"""{option for turns: its value for rows without turns}"""
WITHOUT_TURNS = ("text", "retrieval", "classification", "token_classification", "seq2seq")
"""Values of `data.kind` whose rows have no turns."""
NEEDED_FIELDS = ("role", "from", "content", "value", "train", "weight")
"""Fields of a turn that `data.ignored_fields` cannot name."""


MIXTURE = "mixture"
"""The value of `data.source` with several sources in `data.mixture`."""


class MixedSource(Section):
    """One of several sources, with its part of the training rows: a weight, or an exact number of rows."""

    source: str
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")] = ""
    weight: Positive | None = None
    rows: Count | None = None

    @field_validator("source")
    @classmethod
    def _check_source(cls, source: str) -> str:
        return checked_source(source)

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Derive a missing name from the source, such as `tickets` from data/tickets.jsonl."""
        if isinstance(values, dict) and isinstance(values.get("source"), str) and not values.get("name"):
            name = PurePosixPath(values["source"].partition("@")[0].replace(":", "/")).stem
            return values | {"name": re.sub(r"[^\w.-]", "_", name).lstrip("._-") or "source"}
        return values

    @model_validator(mode="after")
    def _check_part(self) -> Self:
        if self.weight is not None and self.rows is not None:
            raise invalid_value("give weight or rows, not both", "rows", self.rows)
        return self


def checked_source(source: str) -> str:
    """Return a source, a path as git writes it: `./data/rows/` becomes `data/rows`. Raises for an unknown scheme."""
    if source == DEMONSTRATION or re.fullmatch(HUB, source):
        return source
    if re.match(r"[A-Za-z]\w+:", source) or not source:
        raise invalid_value("give stdlib:docstrings, hub:NAME, or the path of a .jsonl, .csv or .parquet")
    return PurePosixPath(source).as_posix()


def source_names(values: Mapping[str, Any]) -> list[str]:
    """Return all sources of a section `data` of params.yaml, or of a version's record."""
    return [one["source"] for one in values.get("mixture") or []] or [values["source"]]


class Data(Section):
    """Source, format and splits of the rows."""

    renamed: ClassVar = {"fresh": "data.new_files", "unproven": "data.quarantined"}

    source: str = DEMONSTRATION
    mixture: list[MixedSource] = Field(default=[])
    kind: Literal[
        "chat",
        "text",
        "preference",
        "unpaired_preference",
        "classification",
        "token_classification",
        "seq2seq",
        "retrieval",
    ] = "chat"
    tag_scheme: Literal["bio", "plain"] = "bio"
    supervise: Literal["all", "last"] = "all"
    reasoning: Literal["all", "supervised", "none"] = "all"
    ignored_fields: list[Text] = Field(default=[])
    chat_template: Text | None = None
    special_tokens: list[Text] = Field(default=[])
    system_prompt: str | None = None
    max_length: Annotated[int, Field(ge=8)] = 320
    overlong: Literal["drop", "truncate", "error"] = "drop"
    train_rows: Count | None = 1200
    validation_rows: Count | None = 96
    test_rows: Count | None = 256
    validation_share: Confidence = 0.1
    test_share: Confidence = 0.1
    assignment: Literal["filled", "hashed"] = "filled"
    new_files: list[Text] | None = None
    replay_share: Share = 0.5
    quarantined: list[Text] | None = None
    group_column: Text | None = None
    slice_column: Text | None = None
    margin_column: Text | None = None
    extra_columns: list[Text] = Field(default=[])
    near_duplicates: Literal["drop", "keep"] = "drop"
    similarity: Annotated[float, Field(gt=0, le=1)] = 0.8
    max_leakage: Share = 0.01

    @field_validator("source")
    @classmethod
    def _check_source(cls, source: str) -> str:
        return checked_source(source)

    @field_validator("ignored_fields")
    @classmethod
    def _check_ignored_fields(cls, fields: list[str]) -> list[str]:
        if needed := [field for field in fields if field in NEEDED_FIELDS]:
            raise invalid_value(f"a turn needs {', '.join(needed)}; name other fields")
        return fields

    @field_validator("special_tokens")
    @classmethod
    def _check_special_tokens(cls, tokens: list[str]) -> list[str]:
        if any(token != token.strip() for token in tokens) or len(set(tokens)) < len(tokens):
            raise invalid_value("give different tokens without white space at their ends, such as <|action|>")
        return tokens

    @model_validator(mode="before")
    @classmethod
    def _default_system_prompt(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("mixture"):
            return {"source": MIXTURE} | values
        if isinstance(values, dict) and values.get("source", DEMONSTRATION) == DEMONSTRATION:
            return {"system_prompt": DEMONSTRATION_PROMPT} | values
        return values

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.validation_share + self.test_share >= 1:
            raise invalid_value("validation_share + test_share must be below 1", "test_share", self.test_share)
        return self

    @model_validator(mode="after")
    def _check_mixture(self) -> Self:
        if not self.mixture:
            if self.source == MIXTURE:
                raise invalid_value("data.mixture names no sources; give some, or another source", "source", MIXTURE)
            return self
        if self.source != MIXTURE:
            raise invalid_value("data.mixture names the sources; give mixture", "source", self.source)
        names = [one.name for one in self.mixture]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise invalid_value("two sources have this name; give each a name of its own", f"mixture.{index}.name",
                                    name)  # fmt: skip
        if self.kind != "chat" and any(one.source == DEMONSTRATION for one in self.mixture):
            raise invalid_value("stdlib:docstrings holds chats; give chat, or other sources", "kind", self.kind)
        counted = [one for one in self.mixture if one.rows is not None]
        if counted and len(counted) < len(self.mixture):
            index = next(index for index, one in enumerate(self.mixture) if one.rows is None)
            expected = "another source has rows; give rows for each source, or weights alone"
            raise invalid_value(expected, f"mixture.{index}.rows", None)
        total = sum(one.rows or 0 for one in counted)
        if self.train_rows is not None and total > self.train_rows:
            expected = f"the rows of data.mixture sum to {total}; give at least that, or null"
            raise invalid_value(expected, "train_rows", self.train_rows)
        if self.new_files is not None:
            raise invalid_value("data.mixture decides the training rows; give null", "new_files", self.new_files)
        return self

    @model_validator(mode="after")
    def _check_tag_scheme(self) -> Self:
        if self.tag_scheme != "bio" and self.kind != "token_classification":
            expected = f"data.kind is {self.kind}, which has no tags; give bio"
            raise invalid_value(expected, "tag_scheme", self.tag_scheme)
        return self

    @model_validator(mode="after")
    def _check_turns(self) -> Self:
        for key, default in OF_TURNS.items() if self.kind in WITHOUT_TURNS else ():
            if (value := getattr(self, key)) != default:
                shown = "null" if default is None else default
                raise invalid_value(f"data.kind is {self.kind}, which has no turns; give {shown}", key, value)
        if self.kind == "text" and self.overlong != "drop":
            expected = "data.kind is text, and texts are cut into rows of max_length tokens; give drop"
            raise invalid_value(expected, "overlong", self.overlong)
        return self

    @model_validator(mode="after")
    def _check_demonstration(self) -> Self:
        if self.source == DEMONSTRATION and self.kind != "chat":
            raise invalid_value("stdlib:docstrings holds chats; give chat, or a source of your own", "kind", self.kind)
        if self.source == DEMONSTRATION and self.extra_columns:
            expected = "stdlib:docstrings has no further columns; give [], or a source of your own"
            raise invalid_value(expected, "extra_columns", self.extra_columns)
        return self
