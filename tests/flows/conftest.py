"""A tiny git and DVC repository whose one stage `make` copies made-up results, followed by the real `register`."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pytest
from pyarrow import parquet
from safetensors.numpy import save_file

from flows.params import Params, load_params
from flows.paths import Paths
from flows.runtime.project import dvc
from flows.stages import register
from peftcore.files import write_manifest

MERGED = {"kl": 0.002, "top1_agreement": 0.99, "loss": 2.81, "reference_loss": 2.8, "tokens": 400}
OUTS = ("adapter", "architecture.json", "data", "evaluation", "merge.json", "training")
DVC_YAML = f"""\
stages:
  make:
    cmd: exec python make.py
    deps: [source, make.py]
    outs: [{", ".join(f"artifacts/{name}" for name in OUTS)}]
  register:
    cmd: exec python -m flows.stages.register
    params: [project.name, register]
    deps: [artifacts/adapter, artifacts/evaluation, artifacts/merge.json, artifacts/training]
    outs:
      - artifacts/version.json: {{cache: false}}
    metrics:
      - metrics.json: {{cache: false}}
artifacts:
  docstrings: {{path: artifacts/adapter, type: model}}
"""
DVC_CONFIG = """\
[core]
    analytics = false
    check_update = false
    remote = local
['remote "local"']
    url = ../.dvc-remote
    verify = true
"""
IGNORED = "/artifacts/\n/.dvc-remote/\n/reports/\n/.prefect/\n"


@dataclass
class Project:
    """One repository and what a test does in it."""

    root: Path

    @property
    def paths(self) -> Paths:
        return Paths(self.root)

    @property
    def params(self) -> Params:
        return load_params(self.paths.params)

    def git(self, *arguments: str, root: Path | None = None) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=root or self.root, check=True, capture_output=True, text=True).stdout

    def make(self, **results: Any) -> None:
        """Run stage `make` on other made-up results (see `write_results`), those of before if none are given."""
        if results:
            write_results(self.root / "source", **results)
        dvc(self.root, "repro", "--quiet", "make")

    def register(self, **results: Any) -> dict[str, Any]:
        """Run `make`, then `register` in this process; returns the version's record."""
        self.make(**results)
        register.run(self.params, self.paths)
        return json.loads(self.paths.version.read_text())


@pytest.fixture(autouse=True)
def isolated_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration of the machine, and no identity but the one that a test sets."""
    for name in os.environ:
        if name.startswith("GIT_") or name == "EMAIL":
            monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Commands set variables for the processes below them; the next test begins without."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def project(template: Path, tmp_path: Path) -> Project:
    """A repository of its own, after its stage `make`."""
    root = tmp_path / "project"
    shutil.copytree(template, root, symlinks=True)
    return Project(root)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository that each `project` is a copy of, made once."""
    root = tmp_path_factory.mktemp("template")
    (root / ".dvc").mkdir()
    (root / ".dvc" / "config").write_text(DVC_CONFIG)
    (root / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n")
    (root / "dvc.yaml").write_text(DVC_YAML)
    (root / "params.yaml").write_text("project: {name: docstrings}\nregister: {remote: local}\n")
    (root / ".gitignore").write_text(IGNORED)
    (root / "make.py").write_text("import shutil\nshutil.copytree('source', 'artifacts', dirs_exist_ok=True)\n")
    write_results(root / "source")
    project = Project(root)
    project.git("-c", "init.defaultBranch=main", "init", "--quiet")
    project.git("config", "user.name", "Ada")
    project.git("config", "user.email", "ada@example.org")
    project.git("add", "--all")
    project.git("commit", "--quiet", "--message=Start")
    project.make()
    return root


@pytest.fixture
def registered(registered_template: Path, tmp_path: Path) -> Project:
    """`project` with v0.1.0 registered."""
    root = tmp_path / "project"
    shutil.copytree(registered_template, root, symlinks=True)
    return Project(root)


@pytest.fixture(scope="session")
def registered_template(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository that each `registered` is a copy of, made once."""
    root = tmp_path_factory.mktemp("registered") / "project"
    shutil.copytree(template, root, symlinks=True)
    Project(root).register()
    return root


@pytest.fixture(scope="session")
def project_at() -> Callable[[Path], Project]:
    """A `Project` in a folder that holds a copy of `template`, for fixtures that several tests share."""
    return Project


@pytest.fixture
def results() -> Callable[..., None]:
    """`write_results`, for tests without a repository."""
    return write_results


@pytest.fixture
def tiny_params() -> Callable[..., Params]:
    """`tiny_params(train={...}, method={...})`: parameters for a run of eight steps, with these sections changed."""

    def make(**sections: dict[str, Any]) -> Params:
        given: dict[str, dict[str, Any]] = {
            "data": {
                "source": "rows.jsonl",
                "group_column": "book",
                "slice_column": "book",
                "train_rows": 32,
                "validation_rows": 8,
                "test_rows": 12,
                "validation_share": 0.15,
                "test_share": 0.15,
            },
            "method": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
            "train": {"batch_size": 4, "gradient_accumulation": 1, "learning_rate": 0.01, "evaluations": 4},
            "evaluate": {"rows": 12, "batch_size": 4, "generate_rows": 6, "max_new_tokens": 8, "samples": 3},
            "merge": {"rows": 6},
            "tracking": {"mode": "disabled"},
        }
        for name, section in sections.items():
            given[name] = given.get(name, {}) | section
        return Params.model_validate(given)

    return make


@pytest.fixture
def prepared(tmp_path: Path, tiny_base: Path, tiny_params: Callable[..., Params]) -> Paths:
    """Paths below `tmp_path` with the base fetched and sums with their answers prepared."""
    from flows.stages import prepare

    rows = [
        {"prompt": f"How much is {number} and 1?", "completion": f"{number + 1}.", "book": f"book{number // 4}"}
        for number in range(100)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = Paths(tmp_path)
    prepare.run(tiny_params(), paths)
    return paths


@pytest.fixture
def trained(prepared: Paths, tiny_params: Callable[..., Params]) -> Paths:
    """`prepared`, and an adapter trained on it."""
    from flows.stages import train

    train.run(tiny_params(), prepared)
    return prepared


def write_results(
    folder: Path,
    loss: float = 2.7,
    weight: float = 1.0,
    row_changes: Sequence[float] = (0.0,) * 40,
    row_slices: Sequence[str] = ("json",) * 30 + ("<ssl>",) * 10,
    **metrics: Any,
) -> None:
    """What the stages before register leave: an adapter of weights `weight`, a test loss of `loss` nats a token.

    row_changes, row_slices: of the 40 test rows, what is added to their losses, and where they belong.
    metrics: other values for the keys of evaluation/metrics.json; the rows are such that its figures follow from them.
    """
    for name in ("adapter", "data", "evaluation", "training"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    _write_adapter(folder / "adapter", weight)
    noise = numpy.random.default_rng(0).normal(0, 0.02, 40)
    told = metrics.get("adapter", {}).get("loss", loss)
    losses = told + noise - noise.mean() + numpy.asarray(row_changes)
    loss = float(losses.mean()) if any(row_changes) else told
    side = {"perplexity": 10.0, "tokens_per_second": 100.0}
    sides = {
        "base": metrics.pop("base", {"loss": 3.8, "rouge_l": 0.16, "ended": 0.3, **side}),
        "adapter": metrics.pop("adapter", {"loss": loss, "rouge_l": 0.31, "ended": 1.0, **side}),
    }
    names, rows = numpy.array(row_slices), {"base": numpy.full(40, 3.8), "adapter": losses}
    columns = {"id": [f"row{n}" for n in range(40)], "slice": list(row_slices), "tokens": [10] * 40}
    columns |= {f"{name}_loss": values for name, values in rows.items()}
    for name, figures in sides.items():
        columns |= _answers(name, figures)
    parquet.write_table(pyarrow.table(columns), folder / "evaluation" / "rows.parquet")
    control = {"id": [f"text{n}" for n in range(8)], "tokens": [100] * 8, "base_loss": [3.0] * 8}
    parquet.write_table(pyarrow.table(control | {"adapter_loss": [2.9] * 8}), folder / "evaluation" / "control.parquet")
    for name, value in {
        "evaluation/metrics.json": {
            **sides,
            "gain": {
                "loss": sides["base"]["loss"] - sides["adapter"]["loss"],
                "rouge_l": sides["adapter"].get("rouge_l", 0.0) - sides["base"].get("rouge_l", 0.0),
            },
            "rows": 40,
            "generated_rows": 10,
            "evaluation_set": "e" * 64,
            "base_model": "b" * 64,
            "control": {"base_loss": 3.0, "adapter_loss": 2.9, "rows": 8},
            "slices": {
                name: {"rows": int((names == name).sum())}
                | {f"{side}_loss": float(losses[names == name].mean()) for side, losses in rows.items()}
                for name in sorted(set(row_slices))
            },
            **metrics,
        },
        "evaluation/samples.json": [SAMPLE],
        "training/summary.json": SUMMARY,
        "merge.json": {"into": "dequantized", **MERGED, "candidates": {"dequantized": MERGED, "requantized": MERGED}},
        "data/report.json": REPORT,
        "architecture.json": ARCHITECTURE,
    }.items():
        (folder / name).write_text(json.dumps(value))
    (folder / "training" / "loss.csv").write_text(LOSSES)


def _answers(side: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Columns of ten answers, and of forty predicted classes, that come to these figures."""
    ended, rouge_l = figures.get("ended"), figures.get("rouge_l")
    count = 0 if ended is None or ended != ended else round(10 * ended)
    right = round(40 * figures.get("accuracy", 0))
    return {
        "label": ["right"] * 40,
        f"{side}_prediction": ["right"] * right + ["wrong"] * (40 - right),
        f"{side}_rouge_l": [rouge_l] * 10 + [None] * 30,
        f"{side}_ended": pyarrow.array([n < count for n in range(10)] + [None] * 30, pyarrow.bool_()),
    }


def _write_adapter(folder: Path, weight: float) -> None:
    tensors = {"layer.lora_A.weight": numpy.full((2, 4), weight, numpy.float32)}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    write_manifest(folder)


SAMPLE = {
    "id": "a",
    "slice": "json",
    "prompt": "def greet(): ...",
    "reference": "Say <hello> & wave.",
    "base": "<script>alert(1)</script>",
    "adapter": "Say hello.",
}
SUMMARY = {
    "steps": 4,
    "best_step": 4,
    "best_validation_loss": 2.7,
    "seconds": 61.0,
    "tokens": 1234,
    "trainable_parameters": 8,
    "wandb_run_id": None,
    "method": "lora",
}
LOSSES = """\
step,train_loss,validation_loss,learning_rate
1,3.5,,0.0005
2,3.1,3.0,0.0004
3,2.9,,0.0002
4,2.8,2.7,0.0
"""
_SPLIT = {
    "rows": 40,
    "available": 50,
    "groups": 4,
    "slices": 2,
    "truncated": 0,
    "tokens": 900,
    "length": {"min": 5, "median": 20, "p90": 40, "p99": 50, "max": 60},
    "supervised_tokens": 90,
    "supervised_share": 0.1,
    "supervised_length": {"min": 1, "median": 2, "p90": 4, "p99": 5, "max": 6},
}
REPORT = {
    "source": "stdlib:docstrings",
    "examples": 60,
    "dropped": {"longer than 320 tokens": 3},
    "splits": {"train": _SPLIT, "validation": _SPLIT, "test": _SPLIT},
    "leakage": {"train-test": {"groups": 0, "prompts": 0}},
    "doctor": {
        "examined": {"train": "1" * 64, "validation": "2" * 64, "test": "3" * 64},
        "findings": [
            {
                "check": "characters",
                "severity": "warning",
                "figure": "2 of 120 rows hold control characters",
                "value": 0.0167,
                "fix": "write the source as UTF-8",
                "examples": ["a"],
            }
        ],
    },
    "rendered": [{"id": "a", "segments": [["user: greet()", False], ["Say hello.", True]]}],
}
ARCHITECTURE = {
    "family": "llama",
    "class_name": "LlamaForCausalLM",
    "kind": "causal decoder",
    "num_blocks": 2,
    "hidden_size": 8,
    "vocab_size": 100,
    "parameters": 1000,
    "memory_bfloat16": 2000,
    "memory_nf4": 900,
    "tied_weights": [],
    "target_modules": {"q_proj": {"role": "query", "in_features": 8, "out_features": 8, "count": 2}},
}
