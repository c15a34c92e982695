"""start: the adapters of `train.start_from` and `train.distillation.teacher` as registered, or nothing.

The rows that the adapter to continue has learned come with it, so that prepare does not use them for evaluation, and so
does the calibrated base that it was trained on.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow
from pyarrow import parquet

from flows.errors import RegistryError
from flows.params import Params
from flows.paths import Paths, Split
from flows.registry.project_registry import registry_of
from flows.registry.registered_files import files_of
from flows.registry.registry import Registry
from flows.runtime.project import files_at
from flows.runtime.stage import start
from peftcore.files import damaged_files, directory_written_atomically, read_manifest

logger = logging.getLogger("flows.start")
LEARNED: tuple[Split, ...] = ("train", "validation")
"""Splits that were trained on, or that decided when training stopped."""
QUESTIONS = ("prompt", "text", "query")
"""Columns that hold the question; each kind of prepared rows has one of them."""
ANSWERS = ("completion", "chosen", "label_name", "tags", "target", "positive")
"""Columns that hold the answer; each kind of prepared rows has one of them."""


def run(params: Params, paths: Paths) -> None:
    """Write `paths.start`. Raises RegistryError if a version is unknown or its adapter is not as registered."""
    number, teacher = params.train.start_from, params.train.distillation.version
    with directory_written_atomically(paths.start) as folder:
        (folder / paths.start_source.name).write_text(json.dumps({"version": number}) + "\n", encoding="utf-8")
        if teacher is not None:
            registry = registry_of(params, paths.root)
            _copy_adapter(registry, teacher, paths, folder / paths.teacher_adapter.name, "train.distillation.teacher")
            (folder / paths.teacher_source.name).write_text(json.dumps({"version": teacher}) + "\n", encoding="utf-8")
        if number is None:
            return
        registry = registry_of(params, paths.root)
        _copy_adapter(registry, number, paths, folder / paths.start_adapter.name, "train.start_from")
        version = registry.version(number)
        if registry.record(version).get("calibrated_base") is not None:
            with files_of(paths, registry, version, [paths.calibrated]) as at:
                shutil.copytree(at.calibrated, folder / paths.start_calibrated.name)
        tables = list(_learned(registry, number, paths))
        parquet.write_table(pyarrow.concat_tables(tables), folder / paths.start_learned.name)
        logger.info("training starts from %s", version.tag)


def _copy_adapter(registry: Registry, number: str, paths: Paths, target: Path, key: str) -> None:
    """Copy a version's adapter as it was registered. key: the parameter that names the version."""
    version = registry.version(number)
    name = paths.adapter.relative_to(paths.root).as_posix()
    with files_at(paths.root, version.commit, [name]) as at:
        adapter = at / name
        if damaged_files(adapter) or read_manifest(adapter) != registry.record(version)["adapter"]["files"]:
            raise RegistryError(
                f"{key}: the adapter of {version.tag} is not what was registered; `dvc push` it again from a machine "
                "that has it, or give another version"
            )
        shutil.copytree(adapter, target)


def _learned(registry: Registry, number: str, paths: Paths) -> Iterator[pyarrow.Table]:
    """Yield question and answer of the rows that a version and its start versions have learned."""
    before: str | None = number
    name = paths.data.relative_to(paths.root).as_posix()
    while before is not None:
        version = registry.version(before)
        with files_at(paths.root, version.commit, [name]) as at:
            for split in LEARNED:
                yield _texts(at / name / paths.split(split).name, version.tag)
        before = registry.record(version)["params"]["train"].get("start_from")


def _texts(path: Path, tag: str) -> pyarrow.Table:
    """Return the columns question and answer. Raises RegistryError if the version has no such file."""
    if not path.exists():
        raise RegistryError(
            f"train.start_from: the data of {tag} have no {path.name}, so its training rows cannot be kept out of "
            "the test rows; give another version"
        )
    columns = parquet.read_schema(path).names
    question, answer = (next(name for name in names if name in columns) for names in (QUESTIONS, ANSWERS))
    return parquet.read_table(path, columns=[question, answer]).rename_columns({question: "question", answer: "answer"})


if __name__ == "__main__":
    start(run)
