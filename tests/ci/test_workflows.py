"""The workflows fit GitHub's own schemas, hold no logic, and give an event's text no way into a shell."""

import subprocess
import sys
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
        uses = step.get("uses", "./")
        assert uses.startswith("./") or uses.rpartition("@")[2].removeprefix("v").isdecimal(), "pinned by major version"


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
    wanted = {("comment", "pull-requests"), ("promote", "contents")} if path.stem == "gate" else set()
    assert writes == wanted
    assert "pull_request_target" not in content.get("on", content.get(True))
    for name, job in content["jobs"].items():
        assert "timeout-minutes" in job
        keeps = [s["with"].get("persist-credentials", True) for s in job["steps"] if "checkout" in s.get("uses", "")]
        assert not any(keeps) or name == "promote", "only who pushes keeps the token"


def test_the_gate_sees_all_tags_and_two_do_not_race() -> None:
    jobs = load(GITHUB / "workflows" / "gate.yml")["jobs"]
    for name in ("judge", "promote"):
        (checkout,) = [step for step in jobs[name]["steps"] if "checkout" in step["uses"]]
        assert checkout["with"]["fetch-depth"] == 0
    assert jobs["promote"]["concurrency"] == {"group": "promote", "cancel-in-progress": False}
    assert "default_branch" in jobs["promote"]["steps"][0]["with"]["ref"], (
        "the rules are not those of the commit judged"
    )
    assert not any("checkout" in step.get("uses", "") for step in jobs["comment"]["steps"])


def test_the_action_passes_what_the_command_reads() -> None:
    from typer.main import get_command

    from flows.cli import app

    command = get_command(app).commands["ci"]  # pyright: ignore[reportAttributeAccessIssue]
    read = {option.envvar for option in command.params if getattr(option, "envvar", None)}
    passed = {name for step in steps(ACTIONS[0]) for name in step.get("env", {}) if name.startswith("PEFTCORE_")}
    assert passed and passed <= read
