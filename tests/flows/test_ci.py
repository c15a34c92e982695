"""The gate as a CI runs it: a fresh clone without artifacts, a tag that was pushed, a DVC remote that is a folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

GATE = Path(__file__).parents[2] / ".ci" / "gate"


class Origin:
    """A bare repository, its DVC remote beside it, and runners that clone it."""

    def __init__(self, folder: Path, project: Any) -> None:
        self.folder, self.bare, self.git = folder, folder / "origin.git", project.git

    def tags(self) -> list[str]:
        return self.git("tag", "--list", "*#*", root=self.bare).split()

    def job(self, name: str, ref: str, *arguments: str, branch: str = "main", **variables: str) -> "Runner":
        clone = self.folder / name
        self.git("clone", "--quiet", "--branch", branch, str(self.bare), str(clone))
        assert not (clone / "artifacts").exists() and not (clone / ".dvc" / "cache").exists()
        return Runner(clone, ref, arguments, variables)


class Runner:
    """One job, with the environment that GitHub's runner sets; it starts at once."""

    def __init__(self, clone: Path, ref: str, arguments: tuple[str, ...], variables: dict[str, str]) -> None:
        self.summary, self.output = (clone.parent / f"{clone.name}-{what}" for what in ("summary", "output"))
        self.process = subprocess.Popen(
            ["bash", str(clone / ".ci" / "gate"), *arguments],
            env={
                **os.environ,
                "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
                "CI": "true",
                "GITHUB_ACTIONS": "true",
                "GITHUB_REF": ref,
                "GITHUB_STEP_SUMMARY": str(self.summary),
                "GITHUB_OUTPUT": str(self.output),
                "GITHUB_BASE_REF": "",
                "PEFTCORE_CI_VERSION": "",
                "PEFTCORE_CI_DRY_RUN": "",
                **variables,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self) -> tuple[int, str, str, dict[str, str]]:
        """Exit status, what it wrote to stderr, the summary and the outputs."""
        _, stderr = self.process.communicate(timeout=120)
        outputs = dict(line.split("=", 1) for line in self.output.read_text().splitlines())
        return self.process.returncode, stderr, self.summary.read_text(), outputs


@pytest.fixture(scope="module")
def published(template: Path, project_at: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """v0.1.0 and v0.1.3 are good, v0.1.1 is not, v0.1.2 is a branch's own; all that somebody at home has pushed."""
    folder = tmp_path_factory.mktemp("published")
    project = project_at(shutil.copytree(template, folder / "home", symlinks=True))
    config = project.root / ".dvc" / "config"
    config.write_text(config.read_text().replace("../.dvc-remote", str(folder / "dvc-remote")))
    (project.root / ".ci").mkdir()
    shutil.copy(GATE, project.root / ".ci" / "gate")
    project.git("add", "--all")
    project.git("commit", "--quiet", "--message=Remote")
    project.register()
    project.register(loss=3.7, weight=1.5)
    project.git("checkout", "--quiet", "-b", "longer")
    project.git("commit", "--quiet", "--allow-empty", "--message=Train longer")
    project.register(loss=2.5, weight=2.0)
    project.git("checkout", "--quiet", "main")
    project.register(loss=2.6, weight=3.0)
    project.git("clone", "--quiet", "--bare", str(project.root), str(folder / "origin.git"))
    return project


@pytest.fixture
def origin(published: Any, tmp_path: Path) -> Origin:
    shutil.copytree(published.root.parent / "origin.git", tmp_path / "origin.git")
    return Origin(tmp_path, published)


def test_a_good_version_whose_tag_is_pushed_is_promoted_in_the_origin(origin: Origin) -> None:
    status, stderr, summary, outputs = origin.job("job", "refs/tags/docstrings@v0.1.0").end()
    assert (status, origin.tags()) == (0, ["docstrings#champion#1"]), stderr
    assert summary.startswith("## ✅ docstrings v0.1.0 is champion")
    assert "| merge fidelity | ✅ |" in summary and "docstrings#champion#1" in summary
    assert (outputs["verdict"], outputs["version"]) == ("promoted", "v0.1.0")
    assert Path(outputs["report"]).read_text() in summary


def test_a_bad_version_is_refused_with_its_reason(origin: Origin) -> None:
    status, stderr, summary, outputs = origin.job("job", "refs/tags/docstrings@v0.1.1").end()
    assert (status, origin.tags()) == (3, [])
    assert "error: docstrings v0.1.1 is not promoted to champion: gain in loss: 0.100 nats" in stderr
    assert "| gain in loss | ❌ | 0.100 nats, at least 0.5 |" in summary
    assert (outputs["verdict"], outputs["version"]) == ("refused", "v0.1.1")


def test_of_two_jobs_at_once_one_promotes_and_the_other_hears_of_it(origin: Origin) -> None:
    jobs = [origin.job(number, f"refs/tags/docstrings@{number}") for number in ("v0.1.0", "v0.1.3")]
    ended = [job.end() for job in jobs]
    assert sorted(status for status, *_ in ended) == [0, 4], ended
    assert origin.tags() == ["docstrings#champion#1"]
    _, stderr, summary, outputs = next(one for one in ended if one[0] == 4)
    assert "came first" in stderr and "came first" in summary and outputs["verdict"] == "conflict"


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("v1.0.0", "the tag v1.0.0 names no version of docstrings (they look like docstrings@v0.1.0)"),
        ("docstrings@v9.9.9", "the tag docstrings@v9.9.9 is not an annotated tag here, or was taken back"),
    ],
)
def test_a_tag_that_is_no_version_is_named_with_those_that_are(origin: Origin, tag: str, message: str) -> None:
    status, stderr, summary, outputs = origin.job("job", f"refs/tags/{tag}").end()
    assert (status, origin.tags()) == (1, [])
    assert f"error: {message}" in stderr and "there is: docstrings@v0.1.0" in stderr
    assert message in summary and outputs["verdict"] == "error"


def test_a_pull_request_is_told_of_its_branchs_version_and_promotes_nothing(origin: Origin) -> None:
    job = origin.job("job", "refs/pull/7/merge", branch="longer", GITHUB_BASE_REF="main")
    status, stderr, summary, outputs = job.end()
    assert (status, outputs["verdict"], outputs["version"]) == (0, "would promote", "v0.1.2"), stderr
    assert "would become champion" in summary and origin.tags() == []


def test_without_a_version_of_its_own_a_branch_is_told_of_the_newest(origin: Origin) -> None:
    status, stderr, _, outputs = origin.job("job", "refs/heads/main", "--stage", "nightly").end()
    assert (status, outputs["version"], outputs["verdict"]) == (0, "v0.1.3", "would promote"), stderr


def test_nothing_registered_is_nothing_to_judge(origin: Origin) -> None:
    for tag in origin.git("tag", root=origin.bare).split():
        origin.git("tag", "--delete", tag, root=origin.bare)
    status, _, summary, outputs = origin.job("job", "refs/heads/main").end()
    assert (status, outputs["verdict"], outputs["version"]) == (0, "nothing to judge", "")
    assert "`peftcore run` makes one" in summary
