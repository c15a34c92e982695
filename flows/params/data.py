"""Section `data` of params.yaml: the rows, their format, and their split into train, validation and test."""

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from flows.params.section import HUB, Confidence, Count, Section, Share, Text, invalid_value

DEMONSTRATION = "stdlib:docstrings"
DEMONSTRATION_PROMPT = "You write the one-line summary of Python functions."
"""The default `data.system_prompt` of the demonstration; other sources have none."""
OF_TURNS = {"supervise": "all", "reasoning": "all", "ignored_fields": [], "system_prompt": None}
"""{option for turns: its value for texts}"""
NEEDED_FIELDS = ("role", "from", "content", "value", "train", "weight")
"""Fields of a turn that `data.ignored_fields` cannot name."""


class Data(Section):
    """Source, format and splits of the rows."""

    renamed: ClassVar = {"fresh": "data.new_files", "unproven": "data.quarantined"}

    source: str = DEMONSTRATION
    kind: Literal["chat", "text", "preference", "classification"] = "chat"
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
        if isinstance(values, dict) and values.get("source", DEMONSTRATION) == DEMONSTRATION:
            return {"system_prompt": DEMONSTRATION_PROMPT} | values
        return values

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.validation_share + self.test_share >= 1:
            raise invalid_value("validation_share + test_share must be below 1", "test_share", self.test_share)
        return self

    @model_validator(mode="after")
    def _check_text(self) -> Self:
        if self.kind != "text":
            return self
        for key, default in OF_TURNS.items():
            if (value := getattr(self, key)) != default:
                shown = {None: "null"}.get(default, default)
                raise invalid_value(f"data.kind is text, which has no turns; give {shown}", key, value)
        if self.overlong != "drop":
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
