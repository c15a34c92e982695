"""dvc.yaml tells the truth: a changed parameter, file or line of code reruns just the stages that depend on it."""

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from flows.params import Params
from flows.runtime.project import stage_order
from flows.runtime.stage_dependencies import imported_modules, updated

ROOT = Path(__file__).parents[1]
STAGES = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]


def file_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_the_order_is_that_of_the_work() -> None:
    order = stage_order(ROOT)
    names = ["calibrate", "detect", "evaluate", "fetch", "merge", "prepare", "register", "start", "train"]
    assert sorted(order) == sorted(STAGES) == names, "each once: DVC also reads other files named dvc.yaml"
    assert order.index("fetch") < order.index("prepare")
    assert order[-1] == "register"
    assert order.index("prepare") < order.index("train") < min(order.index("evaluate"), order.index("merge"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_takes_the_place_of_its_shell(stage: str) -> None:
    assert STAGES[stage]["cmd"] == f"exec python -m flows.stages.{stage}"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_code_that_it_imports_and_on_no_other(stage: str) -> None:
    assert updated(ROOT, STAGES[stage]) == STAGES[stage]["deps"], "python -m flows.runtime.stage_dependencies --write"


def test_what_is_done_with_an_adapter_retrains_nothing() -> None:
    unrelated = [f"peftcore/{name}" for name in ("serving", "export", "routing", "conversion")]
    unrelated += [
        f"flows/{name}" for name in ("gate", "retraining", "review", "registry", "serving", "commands", "resources")
    ]
    for stage in ("fetch", "prepare", "train", "evaluate", "merge"):
        assert not [dep for dep in STAGES[stage]["deps"] if dep.startswith(tuple(unrelated))]


@pytest.mark.parametrize("stage", STAGES)
def test_its_parameters_are_those_that_it_reads(stage: str) -> None:
    used = [name for name in imported_modules(f"flows.stages.{stage}") if name.startswith("flows")]
    source = "\n".join(file_of(name).read_text() for name in used)
    sections = "|".join(Params.model_fields)
    read = set(re.findall(rf"params\.({sections})\b", source)) - {"tracking", "webhooks"}
    declared = {key.split(".")[0] for key in STAGES[stage].get("params", [])}
    assert declared == read


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_that_its_module_reads_is_declared(stage: str) -> None:
    declared = [f"{key}." for key in STAGES[stage].get("params", [])]
    sections = "|".join(set(Params.model_fields) - {"tracking", "webhooks"})
    read = re.findall(rf"params\.((?:{sections})(?:\.\w+)*)", file_of(f"flows.stages.{stage}").read_text())
    keys = {f"{existing_key(name)}." for name in read}
    missing = {key for key in keys if not any(key.startswith(one) or one.startswith(key) for one in declared)}
    assert not missing, f"dvc.yaml, stages.{stage}.params"


def existing_key(name: str) -> str:
    """Return the parameter at the start of an expression: train.start_from of train.start_from.strip."""
    tree, parts = Params().model_dump(), []
    for part in name.split("."):
        if not isinstance(tree, dict) or part not in tree:
            break
        tree = tree[part]
        parts.append(part)
    return ".".join(parts)


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


def test_gate_retraining_tracking_and_webhooks_rerun_nothing() -> None:
    keys = {key for stage in STAGES.values() for key in stage.get("params", [])} - {"gate.allowed_signers"}
    read = {key.split(".")[0] for key in keys}  # the signers decide which version is the champion to start from
    assert set(Params.model_fields) - read == {"gate", "retrain", "tracking", "webhooks"}
