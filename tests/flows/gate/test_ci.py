"""The gate as a CI runs it: a fresh clone without artifacts, a tag that was pushed, a DVC remote that is a folder."""

import os
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from command_line import peftcore

from flows.errors import RegistryError
from flows.gate.ci import default_branch, judge, rules_for
from flows.gate.gate import Check, GateReport
from flows.gate.promote import Promotion
from flows.params import Params
from flows.paths import Paths
from flows.runtime.git import Git

GATE = Path(__file__).parents[3] / ".ci" / "gate"


class Origin:
    """A bare repository, its DVC remote beside it, and runners that clone it."""

    def __init__(self, folder: Path, project: Any) -> None:
        self.folder, self.bare, self.git = folder, folder / "origin.git", project.git

    def tags(self) -> list[str]:
        return self.git("tag", "--list", "*#*", root=self.bare).split()

    def job(self, name: str, ref: str, *arguments: str, branch: str = "main", **variables: str) -> "Job":
        return Job(self._clone(name, branch), ref, arguments, variables)

    def process(self, name: str, ref: str, *arguments: str, branch: str = "main", **variables: str) -> "Process":
        return Process(self._clone(name, branch), ref, arguments, variables)

    def _clone(self, name: str, branch: str) -> Path:
        clone = self.folder / name
        self.git("clone", "--quiet", "--branch", branch, str(self.bare), str(clone))
        assert not (clone / "artifacts").exists() and not (clone / ".dvc" / "cache").exists()
        return clone


class Job:
    """One job in this process, with the environment that GitHub's runner sets."""

    def __init__(self, clone: Path, ref: str, arguments: tuple[str, ...], variables: dict[str, str]) -> None:
        self.clone, self.arguments = clone, arguments
        self.summary, self.output = (clone.parent / f"{clone.name}-{what}" for what in ("summary", "output"))
        self.environment = {
            "CI": "true",
            "GITHUB_ACTIONS": "true",
            "GITHUB_REF": ref,
            "GITHUB_STEP_SUMMARY": str(self.summary),
            "GITHUB_OUTPUT": str(self.output),
            "GITHUB_BASE_REF": "",
            "PEFTCORE_CI_VERSION": "",
            "PEFTCORE_CI_DRY_RUN": "",
            **variables,
        }

    def end(self) -> tuple[int, str, str, dict[str, str]]:
        """Exit status, what it wrote to stderr, the summary and the outputs."""
        with chdir(self.clone):
            result = peftcore("ci", *self.arguments, **self.environment)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return self.told(result.exit_code, result.stderr)

    def told(self, status: int, stderr: str) -> tuple[int, str, str, dict[str, str]]:
        outputs = dict(line.split("=", 1) for line in self.output.read_text().splitlines())
        return status, stderr, self.summary.read_text(), outputs


class Process(Job):
    """One job as the process that a CI starts; it starts at once."""

    def __init__(self, clone: Path, ref: str, arguments: tuple[str, ...], variables: dict[str, str]) -> None:
        super().__init__(clone, ref, arguments, variables)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.process = subprocess.Popen(
            ["bash", str(clone / ".ci" / "gate"), *arguments],
            env={**os.environ, "PATH": path, **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self) -> tuple[int, str, str, dict[str, str]]:
        _, stderr = self.process.communicate()
        return self.told(self.process.returncode, stderr)


@pytest.fixture(scope="module")
def published(template: Path, project_at: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """v0.1.0 and v0.1.1 are good, v0.1.2 is not, v0.1.3 is the best and of a branch that is not merged."""
    folder = tmp_path_factory.mktemp("published")
    project = project_at(shutil.copytree(template, folder / "home", symlinks=True))
    config = project.root / ".dvc" / "config"
    config.write_text(config.read_text().replace("../.dvc-remote", str(folder / "dvc-remote")))
    (project.root / ".ci").mkdir()
    shutil.copy(GATE, project.root / ".ci" / "gate")
    project.git("add", "--all")
    project.git("commit", "--quiet", "--message=Remote")
    project.register()
    project.register(loss=2.6, weight=2.0)
    project.register(loss=3.7, weight=3.0)
    # a branch that nobody merged, with a better version than those of main
    project.git("checkout", "--quiet", "-b", "topic")
    project.git("commit", "--quiet", "--allow-empty", "--message=Train otherwise")
    project.register(loss=2.0, weight=4.0)
    project.git("checkout", "--quiet", "main")
    project.git("clone", "--quiet", "--bare", str(project.root), str(folder / "origin.git"))
    return project


@pytest.fixture
def origin(published: Any, tmp_path: Path) -> Origin:
    shutil.copytree(published.root.parent / "origin.git", tmp_path / "origin.git")
    return Origin(tmp_path, published)


def test_a_bad_version_is_refused_with_its_reason(origin: Origin) -> None:
    status, stderr, summary, outputs = origin.job("job", "refs/tags/docstrings@v0.1.2").end()
    assert (status, origin.tags()) == (3, []), stderr
    assert "error: docstrings v0.1.2 is not promoted to champion: gain in loss: 0.100 nats" in stderr
    assert "| gain in loss | ❌ | 0.100 nats, at least 0.5 |" in summary
    assert (outputs["verdict"], outputs["version"]) == ("refused", "v0.1.2")


@pytest.mark.slow
def test_of_two_jobs_at_once_the_slower_one_judges_again_against_the_new_champion(origin: Origin) -> None:
    """The loser of the race is not lost: v0.1.1 is better than v0.1.0, whichever of the two was first."""
    jobs = [origin.process(number, f"refs/tags/docstrings@{number}") for number in ("v0.1.0", "v0.1.1")]
    ended = [job.end() for job in jobs]
    (status, _, summary, outputs), better = ended
    assert better[0] == 0 and better[3]["verdict"] == "promoted"
    assert (status, outputs["verdict"]) in {(0, "promoted"), (3, "refused")}, "no conflict is left over"
    assert outputs["verdict"] == "promoted" or "against v0.1.1" in summary
    assert origin.tags() in (["docstrings#champion#1"], ["docstrings#champion#1", "docstrings#champion#2"])
    assert better[2].startswith("## ✅ docstrings v0.1.1 is champion")
    assert "| merge fidelity | ✅ |" in better[2] and Path(better[3]["report"]).read_text() in better[2]


def test_a_pushed_version_waits_until_its_commit_is_in_the_default_branch(origin: Origin) -> None:
    status, _, summary, outputs = origin.job("tag", "refs/tags/docstrings@v0.1.3").end()
    assert (status, outputs["verdict"], outputs["version"]) == (0, "not merged", "v0.1.3")
    assert "is not in main. A push to main that contains the commit promotes" in summary and origin.tags() == []

    # a pull request is told of it all the same, and changes nothing
    request = {"branch": "topic", "GITHUB_BASE_REF": "main"}
    status, _, _, outputs = origin.job("request", "refs/pull/7/merge", **request).end()
    assert (status, outputs["verdict"], outputs["version"], origin.tags()) == (0, "would promote", "v0.1.3", [])

    origin.git("update-ref", "refs/heads/main", "topic", root=origin.bare)  # it is merged
    status, _, _, outputs = origin.job("merged", "refs/heads/main").end()
    assert (status, outputs["verdict"], outputs["version"]) == (0, "promoted", "v0.1.3")


@pytest.mark.slow
def test_a_version_that_is_named_need_not_be_merged(origin: Origin) -> None:
    *_, outputs = origin.job("empty", "refs/tags/docstrings@v0.1.3", "--promote", "--version", "").end()
    assert (outputs["verdict"], origin.tags()) == ("not merged", []), "an empty input names none"
    status, _, _, outputs = origin.job("named", "refs/heads/main", "--promote", "--version", "v0.1.3").end()
    assert (status, outputs["verdict"], origin.tags()) == (0, "promoted", ["docstrings#champion#1"])


@pytest.mark.slow
def test_a_job_of_the_default_branch_catches_up_newest_first_and_judges_nothing_twice(origin: Origin) -> None:
    """Of four tags that are pushed at once GitHub makes no event at all."""
    status, _, summary, outputs = origin.job("first", "refs/heads/main").end()
    assert (status, outputs["verdict"], outputs["version"]) == (0, "promoted", "v0.1.1")
    assert "docstrings v0.1.2 is not promoted" in summary and "v0.1.0" not in summary
    status, _, summary, outputs = origin.job("second", "refs/heads/main").end()
    assert outputs["version"] == "v0.1.2", "there is a champion now, which it was not compared with"
    assert (status, outputs["verdict"]) == (3, "refused")
    status, _, summary, outputs = origin.job("third", "refs/heads/main").end()
    assert (status, outputs["verdict"], outputs["version"]) == (0, "nothing to judge", "")
    assert "docstrings v0.1.3 waits" in summary and origin.tags() == ["docstrings#champion#1"]


def test_a_refusal_is_told_also_where_another_version_cannot_be_judged(
    project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal is noted, so no later job would tell of it."""
    project.register()
    project.register(loss=3.7, weight=3.0)
    project.git("remote", "add", "origin", str(project.root))

    def promote(params: Params, paths: Paths, version: str, dry_run: bool, push_to: str | None) -> Promotion:
        if version == "v0.1.0":
            raise RegistryError("its files cannot be had")
        failed = Check("gain in loss", False, "0.100 nats, at least 0.5")
        return Promotion("docstrings", version, "champion", "refused", None, GateReport(version, None, (failed,)))

    monkeypatch.setattr("flows.gate.ci.promote", promote)
    report, environment = tmp_path / "gate.md", {"CI_COMMIT_BRANCH": "main", "CI_DEFAULT_BRANCH": "main"}
    with pytest.raises(RegistryError, match="its files cannot be had"):
        judge(project.params, project.paths, environment, report)
    assert "docstrings v0.1.1 is not promoted" in report.read_text()
    assert "docstrings@v0.1.0 was not judged\n\nits files cannot be had" in report.read_text()


def test_another_branch_is_judged_only(origin: Origin) -> None:
    status, _, _, outputs = origin.job("topic", "refs/heads/topic", branch="topic").end()
    assert (status, outputs["verdict"], outputs["version"], origin.tags()) == (0, "would promote", "v0.1.3", [])


def test_where_nothing_tells_the_default_branch_it_is_said(project: Any) -> None:
    with pytest.raises(RegistryError, match="set PEFTCORE_CI_DEFAULT_BRANCH to its name"):
        default_branch(Git(project.root), {}, "origin")
    with pytest.raises(RegistryError, match=r"the default branch trunk of origin could not be fetched"):
        default_branch(Git(project.root), {"CI_DEFAULT_BRANCH": "trunk"}, "origin")


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("v1.0.0", "the tag v1.0.0 names no version of docstrings (such as docstrings@v0.1.0)"),
        ("docstrings@v9.9.9", "the tag docstrings@v9.9.9 is not an annotated tag here, or was withdrawn"),
    ],
)
def test_a_tag_that_is_no_version_is_named_with_those_that_are(origin: Origin, tag: str, message: str) -> None:
    status, stderr, summary, outputs = origin.job("job", f"refs/tags/{tag}").end()
    assert (status, origin.tags()) == (1, [])
    assert f"error: {message}" in stderr and "there is: docstrings@v0.1.0" in stderr
    assert message in summary and outputs["verdict"] == "error"


@pytest.mark.parametrize(
    ("environment", "given", "version", "pushed_to"),
    [
        ({"GITHUB_REF": "refs/pull/7/merge", "GITHUB_BASE_REF": "main"}, {}, "v0.2.0", None),
        ({"CI_MERGE_REQUEST_TARGET_BRANCH_NAME": "main"}, {}, "v0.2.0", None),
        ({"GITHUB_REF": "refs/heads/longer"}, {}, "v0.3.0", None),
        ({"GITHUB_BASE_REF": "longer"}, {}, "v0.3.0", None),
        ({"GITHUB_REF": "refs/tags/docstrings@v0.2.0"}, {}, "v0.2.0", "origin"),
        ({"CI_COMMIT_TAG": "docstrings@v0.3.0"}, {"remote": "upstream"}, "v0.3.0", "upstream"),
        ({"TAG_NAME": "docstrings@v0.3.0"}, {"dry_run": True}, "v0.3.0", None),
        ({}, {"version": "v0.2.0", "dry_run": False}, "v0.2.0", "origin"),
    ],
)
def test_the_event_says_which_version_and_whether_it_is_promoted(
    project: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    given: dict[str, Any],
    version: str,
    pushed_to: str | None,
) -> None:
    """v0.2.0 was registered from the branch that is checked out, v0.3.0, the newest, from main."""
    for branch, number in (("longer", "v0.2.0"), ("main", "v0.3.0")):
        project.git("checkout", "--quiet", "-B", branch)
        for message in ("Train otherwise", "Register"):
            project.git("commit", "--quiet", "--allow-empty", f"--message={message} {number}")
        project.git("tag", "--annotate", "--message=x", f"docstrings@{number}")
        project.git("reset", "--quiet", "--hard", "HEAD^")  # a version's own commit is on no branch
        project.git("update-ref", f"refs/remotes/origin/{branch}", "HEAD")
        project.git("checkout", "--quiet", "--detach", "HEAD^")
    project.git("checkout", "--quiet", "main")
    project.git("merge", "--quiet", "--no-edit", "longer")
    project.git("checkout", "--quiet", "longer")
    project.git("remote", "add", "upstream", str(project.root))
    project.git("remote", "add", "origin", str(project.root))
    asked = []

    def promote(params: Params, paths: Paths, version: str, dry_run: bool, push_to: str | None) -> Promotion:
        asked.append((version, dry_run, push_to))
        return Promotion("docstrings", version, "champion", "already", None, None)

    monkeypatch.setattr("flows.gate.ci.promote", promote)
    environment = {"CI_DEFAULT_BRANCH": "main", **environment}
    verdict = judge(project.params, project.paths, environment, tmp_path / "gate.md", **given)
    assert asked == [(version, pushed_to is None, pushed_to)]
    assert (verdict.word, verdict.version) == ("already", version)


def test_a_tag_whose_record_says_another_version_is_refused(origin: Origin) -> None:
    """The outputs would name one version, and another would be judged."""
    who = ("-c", "user.name=Mallory", "-c", "user.email=mallory@example.org")
    tag = ("tag", "--annotate", "--message=x", "docstrings@v9.0.0", "docstrings@v0.1.0^{}")
    origin.git(*who, *tag, root=origin.bare)
    status, stderr, _, outputs = origin.job("job", "refs/tags/docstrings@v9.0.0").end()
    assert (status, origin.tags(), outputs["verdict"]) == (1, [], "error")
    assert "docstrings@v9.0.0 is at the commit of docstrings@v0.1.0" in stderr


def test_the_rules_are_those_of_the_protected_branch(project: Any) -> None:
    (project.root / "signers").write_text("ada@example.org ssh-ed25519 AAAA\n")
    params = project.root / "params.yaml"
    params.write_text(params.read_text() + "gate: {allowed_signers: signers, max_forgetting: 0.1}\n")
    project.git("add", "--all")
    project.git("commit", "--quiet", "--message=Rules")
    project.git("update-ref", "refs/remotes/origin/main", "HEAD")
    project.git("remote", "add", "origin", str(project.root))
    params.write_text("project: {name: docstrings}\n")  # what a pull request would judge itself by
    (project.root / "signers").write_text("mallory@example.org ssh-ed25519 BBBB\n")
    for environment, ref in (
        ({"GITHUB_BASE_REF": "main"}, None),
        ({"CI_DEFAULT_BRANCH": "main"}, None),
        ({}, "HEAD"),
        ({"TAG_NAME": "x"}, None),
    ):
        with rules_for(project.params, project.paths, environment, ref) as rules:
            assert rules.gate.max_forgetting == 0.1
            assert "ada@example.org" in Path(rules.gate.allowed_signers or "").read_text()
    with rules_for(project.params, project.paths, {}) as rules:
        assert rules == project.params
    with (
        pytest.raises(RegistryError, match=r"could not be read from origin/gone.*PEFTCORE_CI_RULES"),
        rules_for(project.params, project.paths, {"GITHUB_BASE_REF": "gone"}),
    ):
        pass


def test_nothing_registered_is_nothing_to_judge(origin: Origin) -> None:
    for tag in origin.git("tag", root=origin.bare).split():
        origin.git("tag", "--delete", tag, root=origin.bare)
    status, _, summary, outputs = origin.job("job", "refs/heads/main").end()
    assert (status, outputs["verdict"], outputs["version"]) == (0, "nothing to judge", "")
    assert "`peftcore run` makes one" in summary
