"""Registering a run: whole or not at all, without touching what the user has checked out."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gto_command import run_gto

from flows.errors import PipelineError, RegistryError, RepositoryError, StageError
from flows.registry.registry import Registry, RegistryConflict
from flows.runtime.git import Git
from flows.runtime.project import dvc, is_experiment, stage_environment
from flows.stages import register
from flows.webhooks.outbox import outbox_path


def versions(project: Any) -> list[str]:
    return [version.number for version in Registry(Git(project.root), "docstrings").versions()]


def repro(project: Any, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dvc", "repro", *arguments]
    return subprocess.run(
        command, cwd=project.root, env=stage_environment(), capture_output=True, text=True, check=False
    )


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def test_the_version_holds_its_lineage(project: Any) -> None:
    append(project.root / "make.py", "# not committed\n")
    project.make()
    record = project.register()
    assert (record["name"], record["version"]) == ("docstrings", "v0.1.0")
    assert record["git"] == {"commit": project.git("rev-parse", "HEAD").strip(), "uncommitted": ["make.py"]}
    assert record["evaluation_set"] == "e" * 64
    assert record["dvc"]["artifacts/adapter"].endswith(".dir")
    assert record["params"]["project"]["name"] == "docstrings"
    assert record["adapter"]["files"].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert record["software"].keys() == {"python", "torch", "transformers", "bitsandbytes", "peftcore"}
    metrics = json.loads(project.paths.metrics.read_text())
    assert metrics == record["metrics"]
    assert metrics["gain"]["loss"] == pytest.approx(1.1)
    assert metrics["training"]["steps"] == 4


def test_its_commit_holds_this_run_and_the_user_notices_nothing(registered: Any) -> None:
    project = registered
    project.git("add", "dvc.lock", "metrics.json")
    project.git("commit", "--quiet", "--message=The run before")
    append(project.root / "params.yaml", "# mine\n")
    project.make(loss=2.5, weight=2.0)
    index = project.root / ".git" / "index"
    before = (index.read_bytes(), project.git("rev-parse", "HEAD"), project.git("branch", "--list"))

    register.run(project.params, project.paths)

    assert (index.read_bytes(), project.git("rev-parse", "HEAD"), project.git("branch", "--list")) == before
    assert project.git("show", "docstrings@v0.1.1:metrics.json") == project.paths.metrics.read_text()
    assert project.git("show", "docstrings@v0.1.1:params.yaml").endswith("# mine\n")
    assert project.git("show", "docstrings@v0.1.1:registry/version.json") == project.paths.version.read_text()
    lock = project.git("show", "docstrings@v0.1.1:dvc.lock")
    assert json.loads(project.paths.version.read_text())["dvc"]["artifacts/adapter"] in lock
    assert "register:" not in lock, "that entry would be the run before's"


@pytest.mark.slow
def test_dvc_gets_the_adapter_of_each_version_and_a_clone_pulls_it(registered: Any, tmp_path: Path) -> None:
    project = registered
    first = (project.paths.adapter / "adapter_model.safetensors").read_bytes()
    project.register(weight=2.0)
    second = (project.paths.adapter / "adapter_model.safetensors").read_bytes()
    for number, expected in (("v0.1.0", first), ("v0.1.1", second)):
        out = tmp_path / number
        dvc(project.root, "artifacts", "get", ".", "docstrings", "--rev", number, "--out", str(out))
        assert (out / "adapter_model.safetensors").read_bytes() == expected

    clone = tmp_path / "clone"
    project.git("clone", "--quiet", str(project.root), str(clone))
    project.git("checkout", "--quiet", "docstrings@v0.1.0", root=clone)
    dvc(clone, "remote", "add", "--local", "--force", "local", str(project.root / ".dvc-remote"))
    dvc(clone, "pull")
    assert (clone / "artifacts" / "adapter" / "adapter_model.safetensors").read_bytes() == first


def test_the_same_adapter_is_the_same_version_unless_it_is_evaluated_anew(registered: Any) -> None:
    project, first = registered, json.loads(registered.paths.version.read_text())
    assert project.register() == first
    again = project.register(loss=2.6, weight=1.0)
    assert versions(project) == ["v0.1.0", "v0.1.1"]
    assert again["adapter"] == first["adapter"] and again["metrics"]["adapter"]["loss"] == 2.6
    assert again["holdout_reuse"] == {"test_rows": 2, "trials": 0}
    assert project.register(loss=2.7, weight=1.0) == first


def test_another_test_set_is_a_minor_step(registered: Any) -> None:
    registered.register(weight=2.0)
    registered.register(weight=3.0, evaluation_set="f" * 64)
    assert versions(registered) == ["v0.1.0", "v0.1.1", "v0.2.0"]


@pytest.mark.slow
def test_as_a_stage_of_dvc_it_pushes_while_dvc_waits_and_reruns_only_when_needed(project: Any) -> None:
    done = repro(project)
    assert done.returncode == 0, done.stderr
    assert versions(project) == ["v0.1.0"]
    assert any((project.root / ".dvc-remote").rglob("*.dir"))
    assert "didn't change, skipping" in repro(project, "--single-item", "register").stdout
    assert dvc(project.root, "metrics", "show", "--json")


def test_what_is_wrong_is_one_message_and_registers_nothing(project: Any) -> None:
    (project.root / "params.yaml").write_text(project.paths.params.read_text().replace("docstrings", "summaries"))
    done = repro(project)
    assert done.returncode != 0
    assert "error: project.name is 'summaries', but `artifacts:` in dvc.yaml has no 'summaries'" in done.stderr
    assert "Traceback" not in done.stderr
    assert project.git("tag", "--list") == ""
    assert not project.paths.version.exists()


def broken_remote(project: Any) -> None:
    (project.root / "params.yaml").write_text("project: {name: docstrings}\nregister: {remote: nowhere}\n")


def without_lock(project: Any) -> None:
    (project.root / "dvc.lock").unlink()


def stale_lock(project: Any) -> None:
    append(project.paths.evaluation / "metrics.json", " ")


def without_manifest(project: Any) -> None:
    (project.root / "source" / "adapter" / "SHA256SUMS").unlink()
    project.make()


def without_metrics(project: Any) -> None:
    (project.root / "source" / "evaluation" / "metrics.json").unlink()
    project.make()


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (broken_remote, RepositoryError, "dvc push.*failed.*nowhere"),
        (without_lock, RepositoryError, "dvc.lock is missing"),
        (stale_lock, RepositoryError, "does not match the files of: make"),
        (without_manifest, StageError, "it has no SHA256SUMS"),
        (without_metrics, StageError, "metrics.json is missing"),
    ],
)
def test_each_bad_state_is_named_and_leaves_no_tag(
    project: Any, break_it: Any, error: type[PipelineError], message: str
) -> None:
    break_it(project)
    with pytest.raises(error, match=message):
        register.run(project.params, project.paths)
    assert project.git("tag", "--list") == ""


def test_a_number_taken_meanwhile_is_a_conflict(registered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    registered.make(weight=2.0)
    monkeypatch.setattr(Registry, "next_number", lambda self, minor: "v0.1.0")
    with pytest.raises(RegistryConflict, match="was faster"):
        register.run(registered.params, registered.paths)
    assert versions(registered) == ["v0.1.0"]


def test_without_a_repository_it_says_what_to_do(project: Any, tmp_path: Path) -> None:
    (project.root / ".git").rename(tmp_path / "elsewhere")
    with pytest.raises(RepositoryError, match="versions are git tags"):
        register.run(project.params, project.paths)


def test_a_version_registered_by_gto_is_stepped_over(project: Any) -> None:
    run_gto(project.root, "register", "docstrings", "--version", "v1.0.0")
    assert project.register()["version"] == "v1.1.0"
    with pytest.raises(RegistryError, match="not registered by `peftcore run`"):
        registry = Registry(Git(project.root), "docstrings")
        registry.record(registry.version("v1.0.0"))


@pytest.mark.parametrize("shallow", [False, True])
def test_the_first_version_of_a_shallow_clone_is_said(
    project: Any, shallow: bool, caplog: pytest.LogCaptureFixture
) -> None:
    project.make()
    if shallow:  # what `git clone --depth 1` writes
        (project.root / ".git" / "shallow").write_text(project.git("rev-parse", "HEAD"))
    project.register()
    assert versions(project) == ["v0.1.0"]
    assert ("`peftcore registry fetch REMOTE`" in caplog.text) == shallow
    project.make(loss=2.5, weight=2.0)
    caplog.clear()
    project.register()
    assert "REMOTE" not in caplog.text, "there is a version now"


def test_a_version_names_the_runs_of_its_training_at_each_backend(project: Any) -> None:
    path = project.root / "source" / "training" / "summary.json"
    summary = json.loads(path.read_text()) | {"wandb_run_id": "w1", "tracking_runs": {"mlflow": "m1"}}
    path.write_text(json.dumps(summary))
    record = project.register()
    assert (record["wandb_run_id"], record["tracking_runs"]) == ("w1", {"mlflow": "m1"})
    assert "tracking_runs" not in project.register(weight=2.0), "W&B's run has a key of its own"


def test_a_trial_tells_nobody_of_a_version(
    project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A trial runs this stage in DVC's copy of the repository; a tag at the remote would be a version for all."""
    remote = tmp_path / "origin.git"
    project.git("clone", "--quiet", "--bare", str(project.root), str(remote))
    copy = project.root / ".dvc" / "tmp" / "exps" / "standalone" / "tmp1"
    monkeypatch.setattr(register, "is_experiment", lambda root: is_experiment(copy))
    text = project.paths.params.read_text().replace("remote: local", f"remote: local, git_remote: '{remote}'")
    project.paths.params.write_text(text + "webhooks: {endpoints: [{url: 'http://127.0.0.1:9/'}]}\n")
    with caplog.at_level("INFO"):
        project.register()
    assert project.git("tag", root=remote) == ""
    assert not outbox_path(project.root).exists()
    assert "nothing is registered" in caplog.text
    assert not any((project.root / ".dvc-remote").rglob("*")), "a trial pushes no files"
    assert is_experiment(copy) and not is_experiment(project.root)
