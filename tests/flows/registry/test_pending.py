"""Versions that wait for a verdict: above the stage's holder, with files, and not refused in the present state."""

from pathlib import Path
from typing import Any

import pytest
from registries import add, of

from flows.errors import RegistryError
from flows.params import Params
from flows.registry.approvals import approve
from flows.registry.pending import PREFIX, judged_versions, note_judged, pending_versions, reference


def params(**sections: Any) -> Params:
    return Params.model_validate({"project": {"name": "docstrings"}, **sections})


def numbers(registry: Any, judged: set[str], rules: Params | None = None) -> list[str]:
    return [version.number for version in pending_versions(registry, rules or params(), judged)]


@pytest.fixture
def registry(project: Any) -> Any:
    """A registry with v0.1.0, v0.2.0 and v0.10.0, none of which holds a stage."""
    registry = of(project)
    for number in ("v0.1.0", "v0.2.0", "v0.10.0"):
        add(registry, number)
    return registry


def test_all_versions_wait_newest_first_until_one_holds_the_stage(registry: Any) -> None:
    assert numbers(registry, set()) == ["v0.10.0", "v0.2.0", "v0.1.0"]
    registry.assign("champion", registry.version("v0.2.0"), 0, "m")
    assert numbers(registry, set()) == ["v0.10.0"], "an older version is no candidate"
    registry.assign("shadow", registry.version("v0.10.0"), 1, "m")
    assert numbers(registry, set()) == ["v0.10.0"], "another stage has its own holder"
    assert numbers(registry, set(), params(gate={"stage": "shadow"})) == []


def test_a_version_whose_files_were_collected_does_not_wait(project: Any, registry: Any) -> None:
    project.git("tag", "--annotate", "--message=m", "collected/docstrings/v0.2.0", "docstrings@v0.2.0^{}")
    assert numbers(registry, set()) == ["v0.10.0", "v0.1.0"]


def test_a_refused_version_waits_again_once_the_state_of_its_verdict_has_changed(project: Any, registry: Any) -> None:
    refused = registry.version("v0.2.0")
    rules = params(gate={"approvals": 1})
    judged = {reference(registry, rules, refused)}
    assert numbers(registry, judged, rules) == ["v0.10.0", "v0.1.0"]
    assert numbers(registry, judged, params(gate={"approvals": 1, "max_forgetting": 0.1})) == [
        "v0.10.0",
        "v0.2.0",
        "v0.1.0",
    ], "other rules"
    project.git("config", "user.email", "grace@example.org")
    approve(registry, refused, "fine", None)
    assert "v0.2.0" in numbers(registry, judged, rules), "an approval"
    judged.add(reference(registry, rules, refused))
    assert "v0.2.0" not in numbers(registry, judged, rules)
    registry.assign("champion", registry.version("v0.1.0"), 0, "m")
    assert "v0.2.0" in numbers(registry, judged, rules), "another champion to be compared with"


def test_what_no_verdict_depends_on_leaves_a_refusal_as_it_is(registry: Any) -> None:
    version = registry.version("v0.1.0")
    before = reference(registry, params(), version)
    other = params(
        project={"name": "docstrings", "seed": 7},
        tracking={"mode": "disabled"},
        retrain={"incoming": "/elsewhere"},
        register={"remote": "other"},
    )
    assert reference(registry, other, version) == before
    assert before.rpartition("/")[0] == f"{PREFIX}/docstrings/v0.1.0"


def test_each_other_rule_makes_another_state(registry: Any) -> None:
    rules: list[dict[str, dict[str, Any]]] = [
        {},
        {"data": {"max_length": 64}},
        {"evaluate": {"batch_size": 3}},
        {"gate": {"min_loss_gain": 0.25}},
        {"merge": {"rows": 7}},
        {"train": {"learning_rate": 0.25}},
    ]
    version = registry.version("v0.1.0")
    assert len({reference(registry, params(**one), version) for one in rules}) == len(rules)


def test_another_list_file_of_the_same_signers_is_no_other_rule(project: Any, registry: Any, tmp_path: Path) -> None:
    """The gate of a continuous integration reads the list from a temporary folder."""
    found = set()
    for name in ("one", "other"):
        (tmp_path / name).write_text("")
        rules = params(gate={"allowed_signers": str(tmp_path / name)})
        found.add(reference(registry, rules, registry.version("v0.1.0")))
    assert len(found) == 1


def test_a_refusal_is_known_to_every_clone_and_fetched_by_none(project: Any, registry: Any, tmp_path: Path) -> None:
    remote = tmp_path / "remote.git"
    project.git("clone", "--quiet", "--bare", str(project.root), str(remote))
    for number in ("v0.1.0", "v0.10.0"):
        note_judged(registry, params(), registry.version(number), str(remote))
    note_judged(registry, params(), registry.version("v0.1.0"), str(remote))  # two jobs at once refuse it
    clone = type(project)(tmp_path / "clone")
    project.git("clone", "--quiet", str(remote), str(clone.root))
    there = of(clone)
    assert numbers(there, judged_versions(there, "origin")) == ["v0.2.0"]
    assert project.git("for-each-ref", PREFIX, root=clone.root) == ""


def test_a_remote_that_cannot_be_reached_is_named(registry: Any) -> None:
    with pytest.raises(RegistryError, match="the judged versions could not be read from /nowhere/at-all"):
        judged_versions(registry, "/nowhere/at-all")
    with pytest.raises(RegistryError, match=r"refusal of docstrings@v0\.1\.0 could not be recorded at /nowhere/at-all"):
        note_judged(registry, params(), registry.version("v0.1.0"), "/nowhere/at-all")
