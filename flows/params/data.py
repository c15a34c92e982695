"""Section `data` of params.yaml: the rows, their format, and their split into train, validation and test."""

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from flows.params.section import HUB, Confidence, Count, Section, Share, Text, invalid_value

DEMONSTRATION = "stdlib:docstrings"
DEMONSTRATION_PROMPT = "You write the one-line summary of Python functions."
"""The default `data.system_prompt` of the demonstration; other sources have none."""


class Data(Section):
    """Source, format and splits of the rows."""

    renamed: ClassVar = {"fresh": "data.new_files", "unproven": "data.quarantined"}

    source: str = DEMONSTRATION
    kind: Literal["chat", "preference", "unpaired_preference", "classification"] = "chat"
    supervise: Literal["all", "last"] = "all"
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
    extra_columns: list[Text] = Field(default=[])
    near_duplicates: Literal["drop", "keep"] = "drop"
    similarity: Annotated[float, Field(gt=0, le=1)] = 0.8
    max_leakage: Share = 0.01

    @field_validator("source")
    @classmethod
    def _check_source(cls, source: str) -> str:
        scheme = re.match(r"[A-Za-z]\w+:", source)
        if source == DEMONSTRATION or re.fullmatch(HUB, source):
            return source
        if scheme or not source:
            raise invalid_value("give stdlib:docstrings, hub:NAME, or the path of a .jsonl, .csv or .parquet")
        return source

    @model_validator(mode="before")
    @classmethod
    def _default_system_prompt(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("source", DEMONSTRATION) == DEMONSTRATION:
            return {"system_prompt": DEMONSTRATION_PROMPT} | values
        return values

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.validation_share + self.test_share >= 1:
            raise invalid_value("validation_share + test_share must be below 1", "test_share", self.test_share)
        return self

    @model_validator(mode="after")
    def _check_demonstration(self) -> Self:
        if self.source == DEMONSTRATION and self.kind != "chat":
            raise invalid_value("stdlib:docstrings holds chats; give chat, or a source of your own", "kind", self.kind)
        if self.source == DEMONSTRATION and self.extra_columns:
            expected = "stdlib:docstrings has no further columns; give [], or a source of your own"
            raise invalid_value(expected, "extra_columns", self.extra_columns)
        return self
