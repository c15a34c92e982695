"""The whole pipeline on a clone, on the real base model and real data, made very small."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

pytestmark = pytest.mark.timeout(1800)

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SMALL = {
    "data": {"train_rows": 32, "validation_rows": 8, "test_rows": 8, "max_length": 128},
    "method": {"target_modules": ["q_proj", "v_proj"]},  # for all layers, the start by QERA takes most of a minute
    "train": {"batch_size": 4, "gradient_accumulation": 1, "max_steps": 2, "evaluations": 1},
    "evaluate": {
        **{"rows": 8, "batch_size": 8, "generate_rows": 4, "max_new_tokens": 8, "samples": 2, "latency_rows": 1},
        "control": {"source": "stdlib:topics", "rows": 8, "max_length": 32},
    },
    "merge": {"rows": 4, "max_kl": 1.0, "min_top1_agreement": 0.5},
    "gate": {"min_loss_gain": -5.0, "min_rouge_l_gain": -1.0, "min_eos_rate": 0.0, "max_forgetting": 5.0},
}
"""What differs from params.yaml: two optimiser steps, and a gate that lets nearly everything through."""


class Clone:
    """A clone of what is committed, and the commands that a user types in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # the environment's `peftcore` is installed from the original; the clone's own code has to come first
        path = os.pathsep.join([str(root), str(ROOT / "tests" / "without_peft")])
        self.environment = {**os.environ, "PYTHONPATH": path, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}

    def run(self, *command: str, status: int = 0) -> str:
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def change(self, **sections: dict[str, Any]) -> None:
        yaml = YAML()
        params = yaml.load(self.root / "params.yaml")
        for section, values in sections.items():
            params[section].update(values)
        yaml.dump(params, self.root / "params.yaml")

    def tags(self) -> list[str]:
        return self.run("git", "tag", "--list").split()


def ran(output: str) -> list[str]:
    """Stages that DVC ran rather than skipped."""
    lines = output.splitlines()
    return [line.split("'")[1] for line in lines if line.startswith("Running stage '")]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    clone = Clone(tmp_path_factory.mktemp("end-to-end") / "clone")
    subprocess.run(["git", "clone", "--quiet", "--no-tags", str(ROOT), str(clone.root)], check=True)
    base = ROOT / "artifacts" / "base"
    if (base / "SHA256SUMS").exists():  # otherwise the default: fetched as a user would
        SMALL["base"] = {"source": f"path:{base}"}
    clone.change(**SMALL)
    return clone


@pytest.fixture(scope="module")
def first(clone: Clone) -> str:
    """The output of the first run."""
    return clone.run("peftcore", "run")


@pytest.mark.slow
def test_the_first_run_goes_from_data_to_a_champion(clone: Clone, first: str) -> None:
    assert set(ran(first)) == {
        "fetch",
        "prepare",
        "detect",
        "start",
        "calibrate",
        "train",
        "evaluate",
        "merge",
        "register",
    }
    assert clone.tags() == ["docstrings#champion#1", "docstrings@v0.1.0"]
    assert "docstrings v0.1.0 is champion" in first
    metrics = json.loads((clone.root / "metrics.json").read_text())
    assert 1 < metrics["adapter"]["loss"] < 8
    assert metrics["training"]["steps"] == 2
    page = (clone.root / "reports" / "review.html").read_text()
    assert page.count("<svg") == 3
    assert "LlamaForCausalLM" in page


@pytest.mark.slow
def test_git_shows_no_file_that_the_user_did_not_change(clone: Clone, first: str) -> None:
    lines = clone.run("git", "status", "--porcelain").splitlines()
    assert {line[3:] for line in lines} <= {"params.yaml", "dvc.lock", "metrics.json"}


@pytest.mark.slow
def test_what_was_registered_is_found_by_dvc_and_gto(clone: Clone, first: str, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    clone.run("dvc", "artifacts", "get", ".", "docstrings", "--stage", "champion", "--out", str(out))
    assert (out / "adapter_model.safetensors").exists()
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=out, check=True)
    shown = json.loads(clone.run("gto", "show", "--json"))
    assert shown["docstrings"]["stage"] == {"champion": "v0.1.0"}
    record = json.loads(clone.run("peftcore", "registry", "show", "--json"))
    assert record["git"]["uncommitted"] == ["params.yaml"]


@pytest.mark.slow
def test_dvc_answers_about_metrics_parameters_and_plots(clone: Clone, first: str) -> None:
    assert json.loads(clone.run("dvc", "metrics", "show", "--json"))
    assert "max_steps" in clone.run("dvc", "params", "diff")
    plots = json.loads(clone.run("dvc", "plots", "show", "--json"))
    assert {"loss", "learning rate"} <= {name.rpartition("::")[2] for name in plots["data"]}


@pytest.mark.slow
def test_a_second_run_does_nothing(clone: Clone, first: str) -> None:
    output = clone.run("peftcore", "run")
    assert ran(output) == []
    assert "docstrings v0.1.0 is champion already" in output
    assert len(clone.tags()) == 2


@pytest.mark.slow
def test_dvc_alone_agrees_that_there_is_nothing_to_do(clone: Clone, first: str) -> None:
    assert ran(clone.run("dvc", "repro")) == []


@pytest.mark.proof
def test_a_changed_parameter_reruns_what_depends_on_it_and_a_refusal_exits_with_3(
    clone: Clone, first: str, tmp_path: Path
) -> None:
    clone = Clone(shutil.copytree(clone.root, tmp_path / "clone", symlinks=True))
    clone.change(evaluate={"max_new_tokens": 6}, gate={"min_rouge_l_gain": 0.99})
    output = clone.run("peftcore", "run", status=3)
    assert ran(output) == ["evaluate", "register"]
    # the same adapter with another evaluation is a version of its own
    assert "error: docstrings v0.1.1 is not promoted to champion: gain in ROUGE-L" in output
    assert clone.tags() == ["docstrings#champion#1", "docstrings@v0.1.0", "docstrings@v0.1.1"]
    assert "is not promoted" in (clone.root / "reports" / "review.html").read_text()
