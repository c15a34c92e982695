"""The registry: GTO's tags, and of several writers at once exactly one wins."""

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from gto_command import run_gto

from flows.errors import RegistryError
from flows.registry.registry import RECORD, Registry, RegistryConflict, Version
from flows.runtime.git import Git, GitError


@pytest.fixture
def registry(project: Any) -> Registry:
    return Registry(Git(project.root), "docstrings")


def add(registry: Registry, number: str, content: str = "a") -> Version:
    record = {"version": number, "adapter": {"content": content * 64}}
    return registry.register(number, content * 64, record, {"dvc.lock": "{}\n"}, "good")


def show(registry: Registry) -> dict[str, Any]:
    """What GTO itself makes of the tags."""
    return json.loads(run_gto(registry.git.root, "show", "--json"))["docstrings"]


def test_a_version_is_a_tag_on_a_commit_with_its_record(registry: Registry) -> None:
    version = add(registry, "v0.1.0")
    assert version.tag == "docstrings@v0.1.0"
    assert json.loads(registry.git.show(version.commit, RECORD))["version"] == "v0.1.0"
    assert registry.versions() == [version]
    assert registry.git.show(version.commit, "dvc.lock") == "{}\n"


def test_numbers_go_up_from_the_highest(registry: Registry) -> None:
    assert registry.next_number(minor=False) == "v0.1.0"
    add(registry, "v0.9.0")
    add(registry, "v0.10.2", "b")
    assert registry.next_number(minor=False) == "v0.10.3"
    assert registry.next_number(minor=True) == "v0.11.0"
    assert [version.number for version in registry.versions()] == ["v0.9.0", "v0.10.2"]


def test_a_number_that_is_taken_is_a_conflict(registry: Registry) -> None:
    add(registry, "v0.1.0")
    with pytest.raises(RegistryConflict, match="was faster"):
        add(registry, "v0.1.0", "b")


def test_an_unknown_version_names_those_there_are(registry: Registry) -> None:
    add(registry, "v0.1.0")
    with pytest.raises(RegistryError, match=r"no version v9\.9\.9; there is: v0\.1\.0"):
        registry.version("v9.9.9")


def test_the_last_assignment_holds_the_stage_and_gto_agrees(registry: Registry) -> None:
    first, second = add(registry, "v0.1.0"), add(registry, "v0.2.0", "b")
    assert registry.stages() == {}
    assert registry.assign("champion", first, 0, "m") == "docstrings#champion#1"
    assert registry.assign("champion", second, 1, "m") == "docstrings#champion#2"
    assert registry.assign("shadow", first, 2, "m") == "docstrings#shadow#3"
    assert {stage: holder.version for stage, holder in registry.stages().items()} == {
        "champion": "v0.2.0",
        "shadow": "v0.1.0",
    }
    shown = show(registry)
    assert shown["version"] == "v0.2.0"
    assert shown["stage"] == {"champion": "v0.2.0", "shadow": "v0.1.0"}


def test_events_of_one_second_keep_their_order(registry: Registry) -> None:
    versions = [add(registry, f"v0.1.{n}", "abcdef"[n]) for n in range(4)]
    for event, version in enumerate(versions):
        registry.assign("champion", version, event, "m")
    dates = [tag.created for tag in registry.git.tags("*")]
    assert len(set(dates)) == len(dates) == 8
    assert show(registry)["stage"]["champion"] == "v0.1.3"


def test_a_decision_on_an_outdated_look_is_a_conflict(registry: Registry) -> None:
    first, second = add(registry, "v0.1.0"), add(registry, "v0.2.0", "b")
    last_event = registry.last_event()
    registry.assign("champion", first, last_event, "m")
    with pytest.raises(RegistryConflict):
        registry.assign("champion", second, last_event, "m")
    assert registry.stages()["champion"].version == "v0.1.0"


@pytest.mark.faults("concurrent promotions")
def test_of_six_concurrent_promotions_exactly_one_wins(registry: Registry) -> None:
    versions = [add(registry, f"v0.1.{n}", "abcdef"[n]) for n in range(6)]

    def attempt(version: Version) -> str | None:
        try:
            Registry(Git(registry.git.root), "docstrings").assign("champion", version, 0, "m")
        except RegistryConflict:
            return None
        return version.number

    with ThreadPoolExecutor(6) as pool:
        winners = [number for number in pool.map(attempt, versions) if number]
    assert len(winners) == 1
    assert registry.stages()["champion"].version == winners[0]
    assert len(registry.git.tags("docstrings#champion#*")) == 1


@pytest.mark.faults("concurrent promotions")
def test_of_two_clones_the_remote_lets_one_win_and_the_other_keeps_no_tag(registry: Registry, tmp_path: Path) -> None:
    first, second = add(registry, "v0.1.0"), add(registry, "v0.2.0", "b")
    subprocess.run(["git", "init", "--quiet", "--bare", "shared.git"], cwd=tmp_path, check=True)
    shared = str(tmp_path / "shared.git")
    registry.git.run("push", "--quiet", shared, "HEAD:refs/heads/main", "refs/tags/*:refs/tags/*")
    subprocess.run(["git", "clone", "--quiet", "--branch=main", shared, "clone"], cwd=tmp_path, check=True)
    clone = Registry(Git(tmp_path / "clone"), "docstrings")

    registry.assign("champion", first, 0, "m", push_to=shared)
    with pytest.raises(RegistryConflict, match=r"the remote origin has another docstrings#champion#1; "):
        clone.assign("champion", second, 0, "m", push_to="origin")

    assert clone.stages() == {}
    clone.git.run("fetch", "--quiet", "--tags")
    assert clone.stages()["champion"].version == "v0.1.0"


@pytest.fixture
def shared(registry: Registry, tmp_path: Path) -> Path:
    """A bare repository with the project's branch."""
    subprocess.run(["git", "init", "--quiet", "--bare", "shared.git"], cwd=tmp_path, check=True)
    registry.git.run("push", "--quiet", str(tmp_path / "shared.git"), "HEAD:refs/heads/main")
    return tmp_path / "shared.git"


def test_a_remote_that_cannot_be_reached_promotes_nothing(registry: Registry) -> None:
    version = add(registry, "v0.1.0")
    with pytest.raises(RegistryError, match=r"It is unknown if /nowhere/at-all has "):
        registry.assign("champion", version, 0, "m", push_to="/nowhere/at-all")
    assert registry.stages() == {}


def test_a_hook_that_refuses_is_no_conflict(registry: Registry, shared: Path) -> None:
    version = add(registry, "v0.1.0")
    hook = shared / "hooks" / "pre-receive"
    hook.write_text("#!/bin/sh\necho 'only on Mondays' >&2\nexit 1\n")
    hook.chmod(0o755)
    with pytest.raises(
        RegistryError, match=r"refused docstrings#champion#1, so nothing has changed there: .*only on Mondays"
    ) as caught:
        registry.assign("champion", version, 0, "m", push_to=str(shared))
    assert not isinstance(caught.value, RegistryConflict)
    assert registry.stages() == {}


def test_a_push_of_which_only_the_answer_is_lost_has_promoted(
    registry: Registry, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = add(registry, "v0.1.0")
    push = Git.push_tags

    def push_and_lose(git: Git, remote: str, names: Any) -> None:
        push(git, remote, names)
        raise GitError("`git push` failed: the remote end hung up unexpectedly")

    monkeypatch.setattr(Git, "push_tags", push_and_lose)
    assert registry.assign("champion", version, 0, "m", push_to=str(shared)) == "docstrings#champion#1"
    assert registry.stages()["champion"].version == "v0.1.0"


def test_a_number_that_the_remote_has_is_a_conflict_and_leaves_no_tag(registry: Registry, shared: Path) -> None:
    add(registry, "v0.1.0")
    registry.git.run("push", "--quiet", str(shared), "refs/tags/*:refs/tags/*")
    registry.git.delete_tag("docstrings@v0.1.0")
    record = {"version": "v0.1.0", "adapter": {"content": "b" * 64}}
    with pytest.raises(RegistryConflict, match=r"has another docstrings@v0\.1\.0"):
        registry.register("v0.1.0", "b" * 64, record, {"dvc.lock": "{}\n"}, "good", push_to=str(shared))
    assert registry.versions() == []


def test_what_gto_takes_back_is_gone_here_too(registry: Registry) -> None:
    version = add(registry, "v0.1.0")
    registry.assign("champion", version, 0, "m")
    run_gto(registry.git.root, "deprecate", "docstrings", "v0.1.0", "champion")
    assert registry.stages() == {}
    assert registry.last_event() == 2
    assert registry.versions() == [version]


def test_a_withdrawal_counts_although_its_date_is_before_the_version_s(registry: Registry) -> None:
    version = add(registry, "v0.1.0")
    date = f"{version.created - 1} +0000"
    registry.git.run("tag", "--annotate", "--message=withdrawn", f"{version.tag}!", version.commit,
                     GIT_COMMITTER_DATE=date, GIT_COMMITTER_NAME="a", GIT_COMMITTER_EMAIL="a@b")  # fmt: skip
    assert registry.is_withdrawn(version) and registry.versions() == []


def test_other_names_and_foreign_tags_do_not_count(registry: Registry) -> None:
    add(registry, "v0.1.0")
    for name in ("docstrings2@v0.5.0", "docstrings@latest", "release-1"):
        registry.git.create_tag(name, registry.git.head(), "m", after=0)
    assert [version.number for version in registry.versions()] == ["v0.1.0"]
    assert registry.next_number(minor=False) == "v0.1.1"
