"""Our view of the tags and GTO's are the same one, whatever was registered, promoted, rolled back and taken back."""

import itertools
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gto.api
import pytest

from flows.registry.registry import Registry
from flows.runtime.git import Git
from flows.runtime.project import dvc

NAME, STAGES = "docstrings", ("champion", "shadow", "staging")
OPERATIONS = int(os.environ.get("PEFTCORE_OPERATIONS", "25"))
SECONDS = itertools.count(1_800_000_000)
"""A clock by which each event has a second of its own: GTO, whose dates are not ours to set, knows no finer order."""


@pytest.fixture
def registry(project: Any, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setattr(time, "time", lambda: float(next(SECONDS)))
    return Registry(Git(project.root), NAME)


def register(registry: Registry, chance: random.Random) -> None:
    number = registry.next_number(minor=chance.random() < 0.3)
    content = f"{chance.getrandbits(256):064x}"
    registry.register(number, content, {"version": number}, {"dvc.lock": "{}\n"}, "good")


def promote(registry: Registry, chance: random.Random) -> None:
    version = chance.choice(registry.versions())
    registry.assign(chance.choice(STAGES), version, registry.last_event(), "m")


def roll_back(registry: Registry, chance: random.Random) -> None:
    stage = chance.choice(STAGES)
    versions = {version.number: version for version in registry.versions()}
    past = [one.version for one in registry.holders(stage) if one.version in versions]
    if past:
        registry.assign(stage, versions[chance.choice(past)], registry.last_event(), "back")


@contextmanager
def by_the_clock(git: Git) -> Iterator[None]:
    """Date the tag that is made in this context by SECONDS."""
    before = {tag.name for tag in git.tags("*")}
    yield
    (made,) = [tag for tag in git.tags("*") if tag.name not in before]
    git.delete_tag(made.name)
    git.create_tag(made.name, made.commit, made.message, after=0)


def take_back_a_stage(registry: Registry, chance: random.Random) -> None:
    held = [one for one in registry.stages().values() if one.version]
    if held:
        one = chance.choice(held)
        with by_the_clock(registry.git):
            gto.api.unassign(str(registry.git.root), NAME, version=one.version, stage=one.stage)


def take_back_a_version(registry: Registry, chance: random.Random) -> None:
    versions = [version.number for version in registry.versions()]
    if len(versions) > 1:
        with by_the_clock(registry.git):
            gto.api.deregister(str(registry.git.root), NAME, version=chance.choice(versions))


OURS: list[Callable[[Registry, random.Random], None]] = [register, promote, promote, roll_back]
THEIRS: list[Callable[[Registry, random.Random], None]] = [take_back_a_stage, take_back_a_version]


def view_of_gto(root: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """({version: its stages}, {stage: its version})"""
    # what `gto show NAME` lists, and what `gto show` says of it
    listed = gto.api.show(str(root), NAME, versions_per_stage=1, assignments_per_version=-1)
    stages = dict(gto.api.show(str(root))[NAME]["stage"])
    return {one["version"]: [] for one in listed}, {stage: found for stage, found in stages.items() if found}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("PEFTCORE_SEEDS", "1"))))
def test_after_many_operations_the_views_are_equal(registry: Registry, seed: int) -> None:
    chance = random.Random(seed)
    register(registry, chance)
    for _ in range(OPERATIONS):
        chance.choice(OURS * 2 + THEIRS)(registry, chance)
        versions, stages = view_of_gto(registry.git.root)
        assert sorted(versions) == sorted(version.number for version in registry.versions())
        assert stages == {stage: one.version for stage, one in registry.stages().items() if one.version}


def test_dvc_gets_the_bytes_of_the_champion_by_its_stage(registered: Any, tmp_path: Path) -> None:
    registered.register(loss=2.6, weight=2.0)
    registry, expected = Registry(Git(registered.root), NAME), []
    for event, number in enumerate(("v0.1.1", "v0.1.0")):
        registry.assign("champion", registry.version(number), event, "m")
        out = tmp_path / number
        dvc(registered.root, "artifacts", "get", ".", NAME, "--stage", "champion", "--out", str(out))
        expected.append((out / "adapter_model.safetensors").read_bytes())
    assert expected[0] == (registered.paths.adapter / "adapter_model.safetensors").read_bytes()
    assert expected[1] != expected[0]
