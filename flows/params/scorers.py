"""Entries of `evaluate.scorers`: which function scores an answer, with which options, and what a failure means.

Names and options are checked here, when params.yaml is read. `flows.evaluation.scorers` has the functions.
"""

import hashlib
import importlib.metadata
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, GetJsonSchemaHandler, field_validator, model_validator
from pydantic_core import CoreSchema

from flows.params.file import suggest
from flows.params.section import HUB, Finite, Section, Text, invalid_value
from peftcore.files import sha256

BUILT_IN: Mapping[str, tuple[str, ...]] = {
    "exact_match": ("normalize",),
    "regex": ("pattern", "whole"),
    "json_schema": ("schema",),
    "chrf": ("word_order",),
    "bleu": ("tokenize",),
    "rouge_l": (),
    "token_f1": (),
    "length": ("unit",),
    "code": ("tests", "seconds", "memory_mb"),
    "reward": ("model", "base"),
}
"""{built-in scorer: its options}"""
REQUIRED: Mapping[str, str] = {"regex": "pattern", "json_schema": "schema", "reward": "model"}
"""{built-in scorer: the option that it needs}"""
ENTRY_POINTS = "peftcore.scorers"
"""Group of the entry points of installed scorers; an entry's value is the function."""
WATCHED = "data/"
"""Folder that the evaluate stage depends on in dvc.yaml, so that a changed scorer is measured again."""
RESERVED = frozenset(
    (
        *("loss", "perplexity", "rouge_l", "ended", "tokens_per_second", "answer", "accuracy", "macro_f1"),
        *("margin", "reward_accuracy", "reward_margin", "prediction", "confidence"),
        *("entity_f1", "precision", "recall", "tag_accuracy", "entities", "correct"),
    )
)
"""Names of figures and columns that every evaluation may have."""
REGISTERED = r"(?P<name>[a-z]([a-z0-9-]*[a-z0-9])?)@(?P<version>v\d+\.\d+\.\d+)"
"""Pattern of a registered version of a project."""
_FILE = re.compile(r"(?P<path>data/(?!.*\.\.)[\w./-]+\.py):(?P<function>[A-Za-z_]\w*)")


class Scorer(Section):
    """A function of (prompt, answer, reference, row) that returns a number; a text alone stands for `scorer`."""

    section: ClassVar[str] = "evaluate.scorers"
    """List of params.yaml that has the entry."""

    scorer: Text
    name: str = ""
    options: dict[str, Any] = Field(default={})
    on_error: Literal["stop", "skip"] | Finite = "stop"

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Read a text as the scorer, and derive a missing name from it."""
        values = {"scorer": values} if isinstance(values, str) else values
        if isinstance(values, dict) and isinstance(values.get("scorer"), str) and not values.get("name"):
            return values | {"name": re.sub(r"\W", "_", values["scorer"].rpartition(":")[2]).lower()}
        return values

    @field_validator("on_error", mode="before")
    @classmethod
    def _check_on_error(cls, value: Any) -> Any:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number and value not in ("stop", "skip"):
            raise invalid_value("give stop, skip, or the number that a row without a score gets")
        return value

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise invalid_value("give lower-case letters, digits and underscores, a letter first")
        return name

    @field_validator("scorer")
    @classmethod
    def _check_scorer(cls, scorer: str) -> str:
        if ":" in scorer and not _FILE.fullmatch(scorer):
            raise invalid_value(
                f"give a function as {WATCHED}FILE.py:FUNCTION; the evaluate stage depends on {WATCHED}"
            )
        if ":" not in scorer and scorer not in BUILT_IN:
            known = known_scorers()
            if scorer not in known:
                fits = suggest(scorer, known, "give one of ")
                raise invalid_value(f"{fits} (or {WATCHED}FILE.py:FUNCTION)")
        return scorer

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        measured = self.name == self.scorer and self.section == Scorer.section  # refused below with its own reason
        if self.name in RESERVED and not measured:
            raise invalid_value("every evaluation has this figure; give another name", "name", self.name)
        if self.scorer == "rouge_l" and self.section == Scorer.section:
            raise invalid_value("generated answers always have it; remove this entry", "scorer", self.scorer)
        known = BUILT_IN.get(self.scorer)
        if known is None:
            return self
        for option in self.options:
            if option not in known:
                fits = suggest(option, list(known), "give one of ") if known else "give none"
                raise invalid_value(f"{self.scorer} has no such option; {fits}", f"options.{option}", option)
        if (needed := REQUIRED.get(self.scorer)) is not None and needed not in self.options:
            raise invalid_value(f"{self.scorer} needs options.{needed}", "options", self.options)
        if self.scorer == "reward":
            self._check_reward_model()
        return self

    def _check_reward_model(self) -> None:
        model, base = self.options["model"], self.options.get("base")
        is_version = isinstance(model, str) and re.fullmatch(REGISTERED, model) is not None
        if not is_version and not re.fullmatch(rf"{WATCHED}(?!.*\.\.)[\w./-]+", str(model)):
            expected = (
                f"give a registered version as NAME@v0.1.0, or the folder of an adapter as {WATCHED}FOLDER; the "
                f"evaluate stage depends on {WATCHED}"
            )
            raise invalid_value(expected, "options.model", model)
        if is_version and base is not None:
            raise invalid_value("a registered version has its own base; remove it", "options.base", base)
        if base is not None and not re.fullmatch(rf"{HUB}|path:.+", str(base)):
            raise invalid_value("give hub:NAME or path:FOLDER", "options.base", base)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return the schema of an entry: a text or a mapping."""
        return {"anyOf": [{"type": "string", "minLength": 1}, handler(core_schema)]}

    @property
    def file(self) -> tuple[str, str] | None:
        """Path of the file, relative to the repository, and name of the function; None without a file."""
        match = _FILE.fullmatch(self.scorer)
        return None if match is None else (match["path"], match["function"])

    def given_options(self, root: Path) -> dict[str, Any]:
        """Return the options of the function. A text that begins with data/ is a file, given by its absolute path.

        Args:
            root: The repository.
        """
        return {
            name: str(root.absolute() / value) if _is_file(value) else value for name, value in self.options.items()
        }

    def identity(self, root: Path) -> dict[str, Any]:
        """Return the values that decide the scores; scores can be compared if these are equal.

        Args:
            root: The repository, with the scorer's files. A file that is missing has None in place of its SHA-256. A
                folder has the SHA-256 of its files' names and digests.
        """
        files = [value for value in self.options.values() if _is_file(value)]
        files += [self.file[0]] if self.file else []
        digests = {name: _digest(root / name) for name in sorted(files)}
        return {"scorer": self.scorer, "options": dict(self.options), "on_error": self.on_error, "files": digests}


def known_scorers() -> list[str]:
    """Return the names of the built-in and the installed scorers."""
    return [*BUILT_IN, *(entry.name for entry in importlib.metadata.entry_points(group=ENTRY_POINTS))]


def _digest(path: Path) -> str | None:
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.is_file())
        lines = [f"{sha256(each)}  {each.relative_to(path).as_posix()}\n" for each in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    return sha256(path) if path.is_file() else None


def _is_file(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(WATCHED)
