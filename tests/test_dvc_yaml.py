"""dvc.yaml tells the truth: a changed parameter, file or line of code reruns just the stages that depend on it."""

import re
from pathlib import Path
from typing import Any

import grimp
import pytest
from ruamel.yaml import YAML

from flows.params import Params
from flows.runtime.project import stage_order

ROOT = Path(__file__).parents[1]
STAGES = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
NOT_IN_RESULTS = {
    "flows",
    "flows.errors",
    "flows.base.hub",
    "flows.runtime.logs",
    "flows.params.method_fields",  # what it says of a method's options is in the train stage's dependencies
    "flows.runtime.processes",
    "flows.params.model",
    "flows.params.file",
    "flows.paths",
    "flows.runtime.progress",
    "flows.runtime.stage",
    "flows.stages",
    "flows.runtime.tracking",
    "peftcore.config",
    "peftcore.errors",
    "peftcore.files",
    "peftcore._util.patterns",
    "peftcore.registry",
}
"""Modules that start a stage, show what it does or say what is wrong: they cannot change what a stage writes."""


@pytest.fixture(scope="module")
def imports() -> grimp.ImportGraph:
    return grimp.build_graph("flows", "peftcore", cache_dir=None)


def file_of(module: str) -> str:
    path = Path(*module.split("."))
    return (path / "__init__.py" if (ROOT / path).is_dir() else path.with_suffix(".py")).as_posix()


def is_covered(path: str, deps: list[str]) -> bool:
    return any(path == dep or path.startswith(dep + "/") for dep in deps)


def test_the_order_is_that_of_the_work() -> None:
    order = stage_order(ROOT)
    assert (
        set(order) == set(STAGES) == {"fetch", "prepare", "detect", "start", "train", "evaluate", "merge", "register"}
    )
    assert order.index("fetch") < order.index("prepare")
    assert order[-1] == "register"
    assert order.index("prepare") < order.index("train") < min(order.index("evaluate"), order.index("merge"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_takes_the_place_of_its_shell(stage: str) -> None:
    assert STAGES[stage]["cmd"] == f"exec python -m flows.stages.{stage}"


def test_training_depends_on_what_an_option_of_a_method_means() -> None:
    assert "flows/params/method_fields.py" in STAGES["train"]["deps"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_all_code_that_it_imports(stage: str, imports: grimp.ImportGraph) -> None:
    module = f"flows.stages.{stage}"
    used = {module, *imports.find_upstream_modules(module)} - NOT_IN_RESULTS
    missing = sorted(file for file in map(file_of, used) if not is_covered(file, STAGES[stage]["deps"]))
    assert missing == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_no_code_that_it_does_not_import(stage: str, imports: grimp.ImportGraph) -> None:
    module = f"flows.stages.{stage}"
    used = {file_of(name) for name in (module, *imports.find_upstream_modules(module))}
    code = [dep for dep in STAGES[stage]["deps"] if dep.startswith(("flows", "peftcore"))]
    assert [dep for dep in code if not any(is_covered(file, [dep]) for file in used)] == []


@pytest.mark.parametrize("stage", STAGES)
def test_its_parameters_are_those_that_it_reads(stage: str, imports: grimp.ImportGraph) -> None:
    module = f"flows.stages.{stage}"
    used = {module, *imports.find_upstream_modules(module)} - NOT_IN_RESULTS
    source = "\n".join((ROOT / file_of(name)).read_text() for name in used if name.startswith("flows"))
    sections = "|".join(Params.model_fields)
    read = set(re.findall(rf"params\.({sections})\b", source)) - {"tracking"}
    declared = {key.split(".")[0] for key in STAGES[stage].get("params", [])}
    assert declared == read


@pytest.mark.parametrize("stage", STAGES)
def test_its_parameters_exist(stage: str) -> None:
    defaults: dict[str, Any] = Params().model_dump()
    written = YAML(typ="safe").load(ROOT / "params.yaml")
    for key in STAGES[stage].get("params", []):
        for tree in (defaults, written):
            for part in key.split("."):
                assert part in tree, key
                tree = tree[part]


def test_what_a_stage_reads_another_writes() -> None:
    outs = {name for stage in STAGES.values() for name in stage["outs"] if isinstance(name, str)}
    for name, stage in STAGES.items():
        artifacts = {dep for dep in stage["deps"] if dep.startswith("artifacts")}
        assert artifacts <= outs, name


def test_gate_retraining_and_tracking_rerun_nothing() -> None:
    read = {key.split(".")[0] for stage in STAGES.values() for key in stage.get("params", [])}
    assert set(Params.model_fields) - read == {"gate", "retrain", "tracking"}
