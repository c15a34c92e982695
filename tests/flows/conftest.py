"""A tiny git and DVC repository whose one stage `make` copies made-up results, followed by the real `register`."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_dvc import ForkedDvc
from made_up_results import write_results

from flows.params import Params, load_params
from flows.paths import Paths
from flows.runtime import project as project_module
from flows.runtime import stage_process
from flows.runtime.project import dvc
from flows.stages import register

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
    with _environment_restored():
        yield


@contextmanager
def _environment_restored() -> Iterator[None]:
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
def forked_dvc() -> Iterator[ForkedDvc]:
    """Fork the commands of `flows.runtime.project.dvc` from one parent, until the session ends."""
    forked = ForkedDvc()
    with pytest.MonkeyPatch.context() as patch:
        if sys.platform == "linux":  # elsewhere a fork of a process that has threads is not safe
            patch.setattr(project_module, "subprocess", forked.as_subprocess())
        yield forked
    forked.close()


@pytest.fixture
def forked_stages(forked_dvc: ForkedDvc, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the commands of `run_stage` as well, for tests that are not about its process."""
    if sys.platform == "linux":
        monkeypatch.setattr(stage_process, "subprocess", forked_dvc.as_subprocess())
        monkeypatch.setattr(stage_process, "LONGEST_ADDRESS", 0)  # no fork server: these stages import little


@pytest.fixture(scope="session")
def template(forked_dvc: ForkedDvc, tmp_path_factory: pytest.TempPathFactory) -> Path:
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
def two_projects(template: Path, tmp_path: Path) -> tuple[Project, Project]:
    """One git repository with `projects/mail` and `projects/sql`, each after its stage `make`."""
    top = tmp_path / "repository"
    projects = []
    for name in ("mail", "sql"):
        root = top / "projects" / name
        shutil.copytree(template, root, symlinks=True, ignore=shutil.ignore_patterns(".git", "tmp"))
        for file in ("params.yaml", "dvc.yaml"):
            (root / file).write_text((root / file).read_text().replace("docstrings", name))
        projects.append(Project(root))
    first, second = projects
    first.git("-c", "init.defaultBranch=main", "init", "--quiet", root=top)
    first.git("config", "user.name", "Ada", root=top)
    first.git("config", "user.email", "ada@example.org", root=top)
    first.git("add", "--all", root=top)
    first.git("commit", "--quiet", "--message=Start", root=top)
    return first, second


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


@pytest.fixture(scope="session")
def tiny_params() -> Callable[..., Params]:
    """`tiny_params(train={...}, method={...})`: parameters for a run of eight steps, with these sections changed."""
    return _tiny_params


def _tiny_params(**sections: dict[str, Any]) -> Params:
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
        "evaluate": {
            "rows": 12,
            "batch_size": 4,
            "generate_rows": 6,
            "max_new_tokens": 8,
            "samples": 3,
            "control": {"rows": 4, "max_length": 32},
            "latency_rows": 2,
        },
        "quantization": {"compute_dtype": "bfloat16"},  # on each CPU; auto differs between them
        "merge": {"rows": 6},
        "tracking": {"mode": "disabled"},
    }
    for name, section in sections.items():
        given[name] = given.get(name, {}) | section
    return Params.model_validate(given)


@pytest.fixture
def prepared(prepared_template: Path, tmp_path: Path) -> Paths:
    """Paths below `tmp_path` with the base fetched and sums with their answers prepared."""
    torch.manual_seed(0)
    return Paths(shutil.copytree(prepared_template, tmp_path, dirs_exist_ok=True))


@pytest.fixture(scope="session")
def prepared_template(tmp_path_factory: pytest.TempPathFactory, write_tiny_base: Callable[[Path], Path]) -> Path:
    """The folder that each `prepared` is a copy of, made once."""
    from flows.stages import prepare

    root = tmp_path_factory.mktemp("prepared")
    rows = [
        {"prompt": f"How much is {number} and 1?", "completion": f"{number + 1}.", "book": f"book{number // 4}"}
        for number in range(100)
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = Paths(root)
    write_tiny_base(paths.base)
    prepare.run(_tiny_params(), paths)
    return root


@pytest.fixture
def trained(trained_template: Path, tmp_path: Path) -> Paths:
    """`prepared`, and an adapter trained on it."""
    torch.manual_seed(0)
    return Paths(shutil.copytree(trained_template, tmp_path, dirs_exist_ok=True))


@pytest.fixture(scope="session")
def trained_template(prepared_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that each `trained` is a copy of, made once."""
    from flows.stages import train

    root = tmp_path_factory.mktemp("trained")
    shutil.copytree(prepared_template, root, dirs_exist_ok=True)
    with _environment_restored():
        train.run(_tiny_params(), Paths(root))
    return root
