"""Approvals: each person counts once, for one commit; with a list of signers only signed approvals count."""

import json
from pathlib import Path
from typing import Any

import pytest
from gto_command import run_gto
from registries import Key, add, be, needs_keys, of

from flows.errors import RegistryConflict, RegistryError
from flows.gate.promote import promote
from flows.registry.approvals import approvals, approve, unsigned_approvals
from flows.registry.registry import Registry
from flows.registry.signatures import VARIABLE
from flows.runtime.git import Git


def test_each_person_counts_once_and_who_registered_it_does_not(project: Any) -> None:
    registry = of(project)
    version = add(registry)
    with pytest.raises(RegistryError, match=r"ada@example\.org registered docstrings@v0\.1\.0 and cannot approve it"):
        approve(registry, version, "fine", None)
    be(project, "Grace")
    made = approve(registry, version, "read the\nsamples", None)
    assert (made.who, made.note) == ("grace@example.org", "read the samples")
    be(project, "grace")
    with pytest.raises(RegistryConflict, match=r"has approved docstrings v0\.1\.0 already"):
        approve(registry, version, "again", None)
    for name in ("approved/docstrings/v0.1.0/2", "approved/docstrings/v0.1.0/3"):  # made by hand: the same person
        project.git("tag", "--annotate", "--message=x", name, version.commit)
    project.git("tag", "approved/docstrings/v0.1.0/light", version.commit)
    assert [one.who for one in approvals(registry, version, None)] == ["grace@example.org"]
    be(project, "joan")
    approve(registry, version, "fine", None)
    assert [one.who for one in approvals(registry, version, None)] == ["grace@example.org", "joan@example.org"]
    assert list(json.loads(run_gto(project.root, "show", "--json"))) == ["docstrings"], "GTO passes approvals over"
    assert [one.number for one in registry.versions()] == ["v0.1.0"] and registry.last_event() == 0


def test_an_approval_is_of_one_commit(project: Any) -> None:
    registry = of(project)
    version, other = add(registry), add(registry, "v0.1.1")
    be(project, "grace")
    made = approve(registry, version, "fine", None)
    assert approvals(registry, other, None) == []
    approved = project.git("rev-parse", f"refs/tags/{made.tag}").strip()
    project.git("update-ref", f"refs/tags/{made.tag.replace('v0.1.0', 'v0.1.1')}", approved)
    assert approvals(registry, other, None) == [], "an approval of something else under this name"
    be(project, "ada")
    project.git("tag", "--delete", version.tag)
    (project.root / "params.yaml").write_text("project: {name: docstrings}\n")
    assert approvals(registry, add(registry), None) == [], "of the version of this number that is gone"


def test_an_approval_needs_a_note_and_somebody(project: Any) -> None:
    registry = of(project)
    version = add(registry)
    with pytest.raises(RegistryError, match="needs a note"):
        approve(registry, version, " ", None)
    project.git("config", "--unset", "user.email")
    with pytest.raises(RegistryError, match=r"git config user\.email"):
        approve(registry, version, "fine", None)
    assert project.git("tag", "--list", "approved/*") == ""


@needs_keys
def test_where_signatures_count_only_the_signer_is_somebody(
    project: Any, key: Key, signers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = add(of(project, key("ada")))
    be(project, "grace")  # which says nothing of the key
    with pytest.raises(RegistryError, match=VARIABLE):
        approve(of(project), version, "fine", signers)
    with pytest.raises(RegistryError, match=r"with this key does not count: .*No principal matched"):
        approve(of(project, key("mallory")), version, "fine", signers)
    with pytest.raises(RegistryError, match=r"ada@example\.org registered docstrings@v0\.1\.0 and cannot approve it"):
        approve(of(project, key("ada")), version, "fine", signers)
    assert project.git("tag", "--list", "approved/*") == "", "what does not count does not stay"
    assert approve(of(project, key("grace")), version, "fine", signers).who == "grace@example.org"
    be(project, "joan")
    approve(of(project), version, "fine", None)  # unsigned
    assert [one.who for one in approvals(of(project), version, signers)] == ["grace@example.org"]


def test_an_approval_that_never_reached_the_remote_is_pushed_by_the_same_command(project: Any, tmp_path: Path) -> None:
    registry = of(project)
    version = add(registry)
    remote = tmp_path / "remote.git"
    project.git("clone", "--quiet", "--bare", ".", str(remote))
    be(project, "Grace")
    made = approve(registry, version, "read the\nsamples", None)  # as after a kill between tag and push
    with pytest.raises(RegistryConflict, match="already"):
        approve(registry, version, "another note", None, push_to=str(remote))
    assert approve(registry, version, "read the samples", None, push_to=str(remote)) == made
    assert project.git("tag", root=remote) == project.git("tag")
    with pytest.raises(RegistryConflict, match="already"):
        approve(registry, version, "read the samples", None, push_to=str(remote))


def test_promotion_waits_for_approvals(project: Any, tmp_path: Path) -> None:
    text = "project: {name: docstrings}\nregister: {remote: local}\ngate: {approvals: 1}\n"
    (project.root / "params.yaml").write_text(text)
    project.register()
    refused = promote(project.params, project.paths)
    assert (
        "approval: 0 of 1; people other than the one who registered it approve it with `peftcore approve"
        in refused.sentence
    )
    # somebody else's clone; the approval comes by the remote
    remote = tmp_path / "remote.git"
    project.git("clone", "--quiet", "--bare", ".", str(remote))
    project.git("remote", "add", "origin", str(remote))
    project.git("clone", "--quiet", str(remote), str(tmp_path / "clone"))
    project.git("config", "user.email", "grace@example.org", root=tmp_path / "clone")
    project.git("config", "user.name", "Grace", root=tmp_path / "clone")
    there = Registry(Git(tmp_path / "clone"), "docstrings")
    made = approve(there, there.version("v0.1.0"), "fine", None, push_to="origin")
    there.git.delete_tag(made.tag)
    with pytest.raises(RegistryConflict, match=r"the remote origin has another approved/docstrings/v0\.1\.0/grace-"):
        approve(there, there.version("v0.1.0"), "another note", None, push_to="origin")
    assert there.git.tags("approved/*") == []
    hook = remote / "hooks" / "pre-receive"
    hook.write_text("#!/bin/sh\necho 'only on Mondays' >&2\nexit 1\n")
    hook.chmod(0o755)
    project.git("config", "user.email", "alan@example.org", root=tmp_path / "clone")
    with pytest.raises(RegistryError, match="only on Mondays") as caught:
        approve(there, there.version("v0.1.0"), "fine", None, push_to="origin")
    assert not isinstance(caught.value, RegistryConflict), "a hook that refuses is nobody who was faster"
    assert there.git.tags("approved/*") == []
    project.git("fetch", "--quiet", "--tags", "origin")
    promotion = promote(project.params, project.paths)
    assert promotion.outcome == "promoted" and promotion.report is not None
    assert promotion.report.checks[-1].detail.startswith("1 of 1: grace@example.org; unsigned")


@needs_keys
def test_unsigned_approvals_are_counted_and_do_not_count(project: Any, key: Key, signers: Path) -> None:
    """One person approves twice, by an e-mail that git is told."""
    version = add(of(project, key("ada")))
    for who in ("grace", "hedy"):
        be(project, who)
        approve(of(project), version, "good", None)
    assert len(approvals(of(project), version, None)) == 2, "unsigned, e-mails are all there is"
    assert approvals(of(project), version, signers) == []
    assert len(unsigned_approvals(of(project), version, signers)) == 2
