"""Entries of `evaluate.benchmarks`: tasks of lm-evaluation-harness, or YAML files of tasks below data/."""

import re
from pathlib import Path
from typing import Any, Self

from pydantic import GetJsonSchemaHandler, field_validator, model_validator
from pydantic_core import CoreSchema

from flows.params.scorers import WATCHED
from flows.params.section import Count, Section, Text, Whole, invalid_value
from peftcore.files import sha256

_FILE = re.compile(r"data/(?!.*\.\.)[\w./-]+\.ya?ml")


class Benchmark(Section):
    """A task of the harness; a text alone stands for `task`. None means the task's own value."""

    task: Text
    num_fewshot: Whole | None = None
    limit: Count | None = None
    metric: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Read a text as the task."""
        return {"task": values} if isinstance(values, str) else values

    @field_validator("task")
    @classmethod
    def _check_task(cls, task: str) -> str:
        if task.endswith((".yaml", ".yml")) and not _FILE.fullmatch(task):
            raise invalid_value(f"give {WATCHED}FILE.yaml; the evaluate stage depends on {WATCHED}")
        return task

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise invalid_value(f"give the name of a task, or {WATCHED}FILE.yaml", "task", self.task)
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return the schema of an entry: a text or a mapping."""
        return {"anyOf": [{"type": "string", "minLength": 1}, handler(core_schema)]}

    @property
    def is_file(self) -> bool:
        """True if the task is a file of the repository."""
        return _FILE.fullmatch(self.task) is not None

    @property
    def name(self) -> str:
        """The task's name, or the file's name without its ending."""
        return Path(self.task).stem if self.is_file else self.task

    def identity(self, root: Path) -> dict[str, Any]:
        """Return the values that decide the figures; figures can be compared if these are equal.

        Args:
            root: The repository. The files of a task are its YAML and all files below data/ that the YAML names. A file
                that is missing has None in place of its SHA-256.
        """
        files: dict[str, str | None] = {}
        if self.is_file:
            text = (root / self.task).read_text(encoding="utf-8") if (root / self.task).is_file() else ""
            for name in sorted({self.task, *re.findall(r"data/[\w./-]*\w", text)}):
                files[name] = sha256(root / name) if (root / name).is_file() else None
        return self.model_dump() | {"files": files}
