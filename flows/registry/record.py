"""Validation of lineage records. A record comes from git, so anybody who may push can have written it.

`flows.registry.lineage` writes records. Later releases may add keys, so unknown keys are ignored.
"""

from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ValueError("leads out of its folder; names are relative and without ..")
    return name


Name = Annotated[str, AfterValidator(_inside)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Adapter(BaseModel):
    content: Sha256
    files: dict[Name, Sha256]


class _Side(BaseModel):
    loss: float


class _Metrics(BaseModel):
    base: _Side
    adapter: _Side


class _Params(BaseModel):
    data: dict[str, Any]
    method: dict[str, Any]
    train: dict[str, Any]


class _Git(BaseModel):
    commit: str
    uncommitted: list[str]


class _Record(BaseModel):
    name: str
    version: str
    created: str
    git: _Git
    adapter: _Adapter
    evidence: dict[Name, Sha256]
    evaluation_set: str
    base_model: str
    calibrated_base: Sha256 | None = None
    dvc: dict[Name, str]
    params: _Params
    metrics: _Metrics
    software: dict[str, str]


def check_record(record: Any) -> dict[str, Any]:
    """Return the unchanged record if it is valid. Raises pydantic.ValidationError, which is a ValueError."""
    _Record.model_validate(record)
    return record
