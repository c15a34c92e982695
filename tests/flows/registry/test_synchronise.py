"""Two clones and one remote: every version keeps its files, the remote decides about numbers and stages."""

import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from flows.errors import RegistryError
from flows.gate.promote import promote
from flows.registry.card import CARD
from flows.registry.registry import Registry
from flows.registry.synchronise import synchronise
from flows.runtime.git import Git
from flows.stages import register


@pytest.fixture
def two(project: Any, tmp_path: Path) -> tuple[Any, Any]:
    """Two clones of one project, both with the remote origin."""
    shared = tmp_path / "shared.git"
    subprocess.run(["git", "clone", "--quiet", "--bare", str(project.root), str(shared)], check=True)
    project.git("remote", "add", "origin", str(shared))
    other = type(project)(tmp_path / "other")
    shutil.copytree(project.root, other.root, symlinks=True)
    return project, other


@pytest.fixture(scope="module")
def registered_twice(template: Path, project_at: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a project and a clone, each of which has registered a v0.1.0 of its own."""
    folder = tmp_path_factory.mktemp("registered-twice")
    for weight, name in enumerate(("project", "other"), 1):
        shutil.copytree(template, folder / name, symlinks=True)
        project_at(folder / name).register(weight=float(weight))
    return folder


@pytest.fixture
def diverged(registered_twice: Path, project_at: Any, tmp_path: Path) -> tuple[Any, Any]:
    """`two`, each of which has registered a v0.1.0 of its own."""
    first, second = (
        project_at(shutil.copytree(registered_twice / name, tmp_path / name, symlinks=True))
        for name in ("project", "other")
    )
    shared = str(tmp_path / "shared.git")
    first.git("init", "--quiet", "--bare", shared)
    first.git("push", "--quiet", shared, "main")
    for project in (first, second):
        project.git("remote", "add", "origin", shared)
    return first, second


def registry_of(project: Any) -> Registry:
    return Registry(Git(project.root), "docstrings")


def numbers(project: Any) -> dict[str, str]:
    """{version: its adapter's digest}, first digits."""
    return {version.number: (version.content or "")[:8] for version in registry_of(project).versions()}


def set_git_remote(project: Any) -> None:
    text = project.paths.params.read_text()
    assert "{remote: local}" in text
    project.paths.params.write_text(text.replace("{remote: local}", "{remote: local, git_remote: origin}"))


def test_a_number_that_both_have_given_is_the_remote_s_and_the_other_version_gets_the_next(
    diverged: Any, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = diverged
    record = json.loads(second.paths.version.read_text())
    promote(first.params, first.paths, push_to="origin")
    registry = registry_of(second)
    assert synchronise(registry, "origin") == {"v0.1.0": "v0.2.0"}
    assert "the remote has another docstrings@v0.1.0; the version of this clone is v0.2.0 now" in caplog.text
    content = record["adapter"]["content"]
    assert numbers(second) == {**numbers(first), "v0.2.0": content[:8]}
    renumbered = registry.version("v0.2.0")
    assert registry.record(renumbered) == {**record, "version": "v0.2.0"}
    assert "v0.2.0" in registry.git.show(renumbered.commit, CARD)
    assert registry.stages()["champion"].version == "v0.1.0"  # usable: its version is the remote's
    assert synchronise(registry, "origin") == {}
    promotion = promote(second.params, second.paths, dry_run=True)  # the last run's version, by its new number
    assert promotion.version == "v0.2.0" and promotion.report is not None and promotion.report.champion == "v0.1.0"


def test_a_stage_that_was_given_here_and_not_pushed_makes_way(diverged: Any, caplog: pytest.LogCaptureFixture) -> None:
    first, second = diverged
    promote(second.params, second.paths)  # in this clone alone
    promote(first.params, first.paths, push_to="origin")
    synchronise(registry_of(second), "origin")
    held = registry_of(second).stages()["champion"]
    assert (held.version, held.event) == ("v0.1.0", 1)
    assert "the remote's docstrings#champion#1 replaces" in caplog.text
    register.run(second.params, second.paths)  # the same run again is the same version, by its new number
    assert set(numbers(second)) == {"v0.1.0", "v0.2.0"}
    assert json.loads(second.paths.version.read_text())["version"] == "v0.2.0"


def test_a_version_outlives_a_kill_while_it_makes_way(diverged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = diverged
    content = json.loads(second.paths.version.read_text())["adapter"]["content"]
    first.git("push", "--quiet", "origin", "docstrings@v0.1.0")
    registry, point = registry_of(second), Git.set_reference

    def before(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def after(*arguments: Any, **options: Any) -> None:
        point(*arguments, **options)
        raise KeyboardInterrupt

    for name, killed in (("create_tag", before), ("set_reference", before), ("set_reference", after)):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Git, name, killed)
            synchronise(registry, "origin")
        assert content[:8] in numbers(second).values(), name
    synchronise(registry, "origin")
    assert numbers(second) == {**numbers(first), "v0.2.0": content[:8]}, "it is registered anew once"


def test_a_stage_is_given_up_before_its_version_makes_way(diverged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = diverged
    promote(second.params, second.paths)  # in this clone alone
    first.git("push", "--quiet", "origin", "docstrings@v0.1.0")
    registry, point = registry_of(second), Git.set_reference

    def killed(*arguments: Any, **options: Any) -> None:
        point(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Git, "set_reference", killed)
        synchronise(registry, "origin")
    synchronise(registry, "origin")
    assert registry.stages() == {}
    assert promote(second.params, second.paths).outcome == "promoted"


def test_a_withdrawal_is_of_the_remote_s_version_and_not_of_another_with_its_number(diverged: tuple[Any, Any]) -> None:
    first, second = diverged
    first.git("tag", "--annotate", "--message=withdrawn", "docstrings@v0.1.0!", "docstrings@v0.1.0^{}")
    first.git("push", "--quiet", "origin", "--tags")
    ours = registry_of(second)
    (mine,) = ours.versions()
    assert synchronise(ours, "origin") == {"v0.1.0": "v0.2.0"}
    assert [(one.number, one.content) for one in ours.versions()] == [("v0.2.0", mine.content)]
    second.git("tag", "--annotate", "--message=withdrawn", "docstrings@v0.2.0!", "docstrings@v0.2.0^{}")
    assert ours.is_withdrawn(ours.versions_ever()[-1]) and ours.versions() == []


def test_a_version_that_cannot_be_registered_anew_keeps_its_tag(two: Any) -> None:
    first, second = two
    first.register(weight=1.0)
    first.git("push", "--quiet", "origin", "docstrings@v0.1.0")
    second.git("-c", "user.name=a", "-c", "user.email=a@b", "tag", "-a", "-m", "by hand", "docstrings@v0.1.0")
    before = second.git("rev-parse", "docstrings@v0.1.0")
    with pytest.raises(RegistryError, match=r"Remove it with `git tag --delete docstrings@v0\.1\.0`"):
        synchronise(registry_of(second), "origin")
    assert second.git("rev-parse", "docstrings@v0.1.0") == before


def test_two_that_synchronise_at_once_register_a_version_anew_once(diverged: Any) -> None:
    first, second = diverged
    content = json.loads(second.paths.version.read_text())["adapter"]["content"]
    first.git("push", "--quiet", "origin", "docstrings@v0.1.0")
    with ThreadPoolExecutor() as threads:
        done = [threads.submit(synchronise, registry_of(second), "origin") for _ in range(4)]
        assert sorted(map(len, (one.result() for one in done))) == [0, 0, 0, 1]
    assert numbers(second) == {**numbers(first), "v0.2.0": content[:8]}


def test_tags_of_other_names_stay_as_they_are(two: Any) -> None:
    first, second = two
    for project, text in ((first, "theirs"), (second, "ours")):
        project.git("-c", "user.name=a", "-c", "user.email=a@b", "tag", "-a", "-m", text, "release-1")
    first.git("push", "--quiet", "origin", "release-1")
    first.git("tag", "plain")
    first.git("push", "--quiet", "origin", "plain")
    assert synchronise(registry_of(second), "origin") == {}
    assert "ours" in second.git("tag", "--list", "-n1", "release-1") and "plain" in second.git("tag", "--list")
    assert second.git("for-each-ref", "refs/peftcore") == ""


def test_registering_takes_numbers_by_the_push(two: Any) -> None:
    first, second = two
    for project in two:
        set_git_remote(project)
    one = first.register(weight=1.0)
    two_ = second.register(weight=2.0)
    assert (one["version"], two_["version"]) == ("v0.1.0", "v0.1.1")
    assert json.loads(second.paths.version.read_text())["version"] == "v0.1.1"
    synchronise(registry_of(first), "origin")
    assert numbers(first) == numbers(second)


def test_a_number_taken_between_looking_and_pushing_is_left_to_who_was_first(
    two: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two
    for project in two:
        set_git_remote(project)
    collect = register.collect

    def collect_late(*arguments: Any) -> dict[str, Any]:
        if not numbers(first):
            monkeypatch.setattr(register, "collect", collect)
            first.register(weight=1.0)
        return collect(*arguments)

    second.make(weight=2.0)
    monkeypatch.setattr(register, "collect", collect_late)
    register.run(second.params, second.paths)
    assert list(numbers(second)) == ["v0.1.0", "v0.1.1"]
    record = json.loads(second.paths.version.read_text())
    assert (record["version"], record["adapter"]["content"][:8]) == ("v0.1.1", numbers(second)["v0.1.1"])
