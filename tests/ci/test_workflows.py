"""The workflows fit GitHub's own schemas, hold no logic, and give an event's text no way into a shell."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

GITHUB = Path(__file__).parents[2] / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
ACTIONS = sorted((GITHUB / "actions").glob("*/action.yml"))


def load(path: Path) -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(path)


def triggers(path: Path) -> dict[str, Any]:
    content: dict[Any, Any] = load(path)
    return content["on"] if "on" in content else content[True]  # YAML 1.1 reads `on` as a truth value


def steps(path: Path) -> Iterator[dict[str, Any]]:
    content = load(path)
    for job in [*content.get("jobs", {}).values(), *([content["runs"]] if "runs" in content else [])]:
        yield from job["steps"]


@pytest.mark.parametrize(
    ("schema", "files"), [("github-workflows", WORKFLOWS), ("github-actions", ACTIONS)], ids=["workflows", "actions"]
)
def test_they_fit_githubs_schemas(schema: str, files: list[Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
    done = subprocess.run([*command, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(files[0].read_text().replace("steps:", "stesp:"))
    assert subprocess.run([*command, wrong], capture_output=True, check=False).returncode == 1, "it can fail"


@pytest.mark.parametrize("path", [*WORKFLOWS, *ACTIONS], ids=lambda path: path.parent.name + "/" + path.stem)
def test_a_script_is_one_command_and_takes_nothing_from_an_expression(path: Path) -> None:
    for step in steps(path):
        script = step.get("run", "")
        assert "${{" not in script, "an event's text would be read by the shell; pass it in env"
        assert len(script.strip().splitlines()) <= 1, "logic belongs into `peftcore ci` or a script that runs anywhere"
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


@pytest.mark.parametrize("path", [*WORKFLOWS, *ACTIONS], ids=lambda path: path.parent.name + "/" + path.stem)
def test_actions_of_others_are_pinned_by_digest(path: Path) -> None:
    """A tag can be moved to other code, a commit cannot; the comment says which version it is."""
    lines = [line.split("uses:", 1)[1].strip() for line in path.read_text().splitlines() if "uses:" in line]
    assert len(lines) >= sum("uses" in step for step in steps(path))
    for line in lines:
        assert line.startswith(("./", "OWNER/")) or re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_job_may_do_no_more_than_it_needs(path: Path) -> None:
    content = load(path)
    assert set(content["permissions"].values()) <= {"read"}
    writes = {
        (name, what)
        for name, job in content["jobs"].items()
        for what, level in job.get("permissions", {}).items()
        if level == "write"
    }
    wanted = {
        "gate": {("comment", "pull-requests")},
        "promote": {("promote", "contents")},
        "release": {("attach", "contents"), ("publish", "id-token")},
        "versions": {("ask", "actions")},
    }
    assert writes == wanted.get(path.stem, set())
    assert "pull_request_target" not in triggers(path)
    for name, job in content["jobs"].items():
        assert "timeout-minutes" in job
        keeps = [s["with"].get("persist-credentials", True) for s in job["steps"] if "checkout" in s.get("uses", "")]
        assert not any(keeps) or name == "promote", "only who pushes keeps the token"


def secrets(part: Any) -> set[str]:
    return set(re.findall(r"secrets\.(\w+)", str(part)))


def test_the_gate_sees_all_tags() -> None:
    for name, job in (("gate", "judge"), ("promote", "promote")):
        jobs = load(GITHUB / "workflows" / f"{name}.yml")["jobs"]
        (checkout,) = [step for step in jobs[job]["steps"] if "checkout" in step.get("uses", "")]
        assert checkout["with"]["fetch-depth"] == 0
        assert "ref" not in checkout["with"], "what is checked out is what the event is of"
    comment = load(GITHUB / "workflows" / "gate.yml")["jobs"]["comment"]
    assert not any("checkout" in step.get("uses", "") for step in comment["steps"])


def test_a_tag_runs_nothing_of_its_commit_and_reaches_no_secret() -> None:
    """GitHub reads the workflows of a pushed tag from the tagged commit."""
    of_tags = [path for path in WORKFLOWS if "tags" in (triggers(path).get("push") or {})]
    assert [path.stem for path in of_tags] == ["versions"]
    content = load(of_tags[0])
    assert secrets(content) == set()
    (job,) = content["jobs"].values()
    (step,) = job["steps"]
    assert step["run"].startswith("gh workflow run promote.yml ") and "version" not in step["run"]
    assert "default_branch" in step["env"]["DEFAULT_BRANCH"]


def test_secrets_that_write_are_in_the_environment_of_the_default_branch_alone() -> None:
    jobs = {(path.stem, name): job for path in WORKFLOWS for name, job in load(path)["jobs"].items()}
    promoting = jobs.pop(("promote", "promote"))
    assert promoting["environment"] == "promotion"
    assert set(triggers(GITHUB / "workflows" / "promote.yml")) == {"push", "schedule", "workflow_dispatch"}
    others = {secret for job in jobs.values() for secret in secrets(job)}
    assert others and all(name.startswith("DVC_READ_") for name in others)
    assert not secrets(promoting) & others


def test_no_pending_promotion_is_cancelled() -> None:
    """A concurrency group keeps one pending run and cancels the others; promoting is a compare-and-swap already."""
    content = load(GITHUB / "workflows" / "promote.yml")
    assert "concurrency" not in content and "concurrency" not in content["jobs"]["promote"]


def test_the_action_passes_what_the_command_reads() -> None:
    from typer.main import get_command

    from flows.cli import app

    command = get_command(app).commands["ci"]  # pyright: ignore[reportAttributeAccessIssue]
    read = {option.envvar for option in command.params if getattr(option, "envvar", None)}
    passed = {name for step in steps(ACTIONS[0]) for name in step.get("env", {}) if name.startswith("PEFTCORE_")}
    assert passed and passed <= read


def test_every_supported_python_and_both_systems_are_tested() -> None:
    project = tomllib.loads((GITHUB.parent / "pyproject.toml").read_text())["project"]
    supported = {one.rsplit(" ", 1)[1] for one in project["classifiers"] if ":: Python :: 3." in one}
    jobs = load(GITHUB / "workflows" / "test.yml")["jobs"]
    matrix = jobs["quick"]["strategy"]["matrix"]
    (setup,) = [step for step in jobs["test"]["steps"] if "setup-python" in step.get("uses", "")]
    assert {*matrix["python-version"], setup["with"]["python-version"]} == supported
    assert {*matrix["os"], *(one["os"] for one in matrix["include"])} == {"ubuntu-latest", "macos-latest"}


def test_jobs_that_write_a_release_run_nothing_of_the_repository() -> None:
    jobs = load(GITHUB / "workflows" / "release.yml")["jobs"]
    for name in ("attach", "publish"):
        assert not any("checkout" in step.get("uses", "") for step in jobs[name]["steps"])
        assert jobs[name]["needs"] == "build"


def test_the_gates_action_installs_the_pipeline() -> None:
    (install,) = [step["run"] for step in steps(ACTIONS[0]) if "pip install" in step.get("run", "")]
    assert install.endswith('[pipeline]"')
