"""Signed tags and approvals, with real ssh keys and real git: only who is listed counts, for what they signed."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.errors import RegistryConflict, RegistryError
from flows.gate.promote import promote
from flows.params.model import Gate
from flows.registry.approvals import approvals, approve, unsigned_approvals
from flows.registry.project_registry import deciding_tags
from flows.registry.registry import Registry, Version
from flows.registry.signatures import VARIABLE, Signature, signature_of, signing_key
from flows.runtime.git import Git

needs_keys = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
Key = Callable[[str], Path]


@pytest.fixture
def key(tmp_path: Path) -> Key:
    """`key("ada")`: an ssh key of hers; the file `signers` lists it, unless it is mallory's."""

    def make(who: str) -> Path:
        path = tmp_path / who
        if not path.exists():
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", who, "-f", str(path)]
            subprocess.run(command, check=True)
            if who != "mallory":
                with (tmp_path / "signers").open("a") as signers:
                    signers.write(f"{who}@example.org {path.with_suffix('.pub').read_text()}")
        return path

    (tmp_path / "signers").touch()
    return make


@pytest.fixture
def signers(tmp_path: Path) -> Path:
    return tmp_path / "signers"


def of(project: Any, signing: Path | None = None) -> Registry:
    return Registry(Git(project.root), "docstrings", signing)


def add(registry: Registry, number: str = "v0.1.0") -> Version:
    return registry.register(number, "a" * 64, {"version": number}, {"dvc.lock": "{}\n"}, "good")


def signature(registry: Registry, name: str, signers: Path) -> Signature:
    return signature_of(registry.git, registry.git.tags(name)[0], signers)


def be(project: Any, who: str) -> None:
    project.git("config", "user.email", f"{who}@example.org")


# -- signatures ------------------------------------------------------------------------------------------------------


@needs_keys
def test_a_tag_is_signed_by_whom_the_list_names_and_reads_as_before(project: Any, key: Key, signers: Path) -> None:
    registry = of(project, key("ada"))
    version = add(registry)
    assert signature(registry, version.tag, signers) == Signature("ada@example.org")
    assert version.content == "a" * 64
    assert version.message == "docstrings v0.1.0: good\n\nAdapter: sha256:" + "a" * 64 + "\n", "without the signature"
    tag = registry.assign("champion", version, 0, "promoted\n")
    assert signature(registry, tag, signers) == Signature("ada@example.org")
    gto = Path(sys.executable).with_name("gto")
    shown = subprocess.run([gto, "show", "--json"], cwd=project.root, check=True, capture_output=True)
    assert json.loads(shown.stdout)["docstrings"]["stage"]["champion"] == "v0.1.0"


@needs_keys
def test_no_key_a_key_that_is_not_listed_and_a_key_of_another_kind(project: Any, key: Key, signers: Path) -> None:
    key("ada")
    unsigned = signature(of(project), add(of(project)).tag, signers)
    assert unsigned.signer is None and "no signature found" in (unsigned.problem or "")
    foreign = of(project, key("mallory"))
    unknown = signature(foreign, add(foreign, "v0.1.1").tag, signers)
    assert unknown.signer is None and "No principal matched" in (unknown.problem or "")
    with pytest.raises(RegistryError, match=r"docstrings@v0\.1\.2 could not be made"):
        add(of(project, signers), "v0.1.2")
    assert len(of(project).versions()) == 2


@needs_keys
def test_a_signed_tag_under_another_name_or_with_another_text_is_nobodys(project: Any, key: Key, signers: Path) -> None:
    registry = of(project, key("ada"))
    version = add(registry)
    signed = project.git("rev-parse", f"refs/tags/{version.tag}").strip()
    project.git("update-ref", "refs/tags/docstrings@v9.0.0", signed)  # a good old version as the newest
    assert signature(registry, "docstrings@v9.0.0", signers) == Signature(None, "it was signed as docstrings@v0.1.0")
    text = project.git("cat-file", "tag", signed).replace("a" * 64, "b" * 64)
    (project.root / "forged").write_text(text)
    forged = project.git("hash-object", "-t", "tag", "-w", "forged").strip()
    project.git("update-ref", f"refs/tags/{version.tag}", forged)
    assert signature(registry, version.tag, signers).signer is None


@needs_keys
def test_another_kind_of_signature_is_not_asked(project: Any, key: Key, signers: Path, tmp_path: Path) -> None:
    program = tmp_path / "gpg"  # says of anything that it is good
    program.write_text(
        "#!/bin/sh\ncat >/dev/null; echo '[GNUPG:] NEWSIG'; echo '[GNUPG:] GOODSIG A1 Ada'\n"
        "echo '[GNUPG:] TRUST_ULTIMATE 0 pgp'\n"
        "echo 'Good \"git\" signature for ada@example.org with RSA key SHA256:x' >&2\n"
    )
    program.chmod(0o755)
    project.git("config", "gpg.program", str(program))
    version = add(of(project))
    block = "-----BEGIN PGP SIGNATURE-----\n\naaaa\n-----END PGP SIGNATURE-----\n"
    (project.root / "forged").write_text(project.git("cat-file", "tag", version.tag) + block)
    forged = project.git("hash-object", "-t", "tag", "-w", "forged").strip()
    project.git("update-ref", f"refs/tags/{version.tag}", forged)
    project.git("verify-tag", version.tag)  # fooled
    assert signature(of(project), version.tag, signers).signer is None


@needs_keys
def test_the_key_is_the_environments_or_the_parameters(project: Any, key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    assert signing_key(project.params, project.root) is None
    (project.root / "params.yaml").write_text("project: {name: docstrings}\nregister: {signing_key: ../ada}\n")
    ada = key("ada")
    found = signing_key(project.params, project.root)
    assert found is not None and found.samefile(ada)
    monkeypatch.setenv(VARIABLE, str(key("grace")))
    assert signing_key(project.params, project.root) == key("grace")
    monkeypatch.setenv(VARIABLE, "/nowhere/key")
    with pytest.raises(RegistryError, match=r"register\.signing_key \(or PEFTCORE_SIGNING_KEY\) is /nowhere/key"):
        signing_key(project.params, project.root)


@needs_keys
def test_promotion_asks_for_a_signature_and_signs_its_own_tag(
    project: Any, key: Key, signers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key("ada")
    text = "project: {name: docstrings}\nregister: {remote: local}\ngate: {allowed_signers: ../signers}\n"
    (project.root / "params.yaml").write_text(text)
    project.register()
    refused = promote(project.params, project.paths)
    assert refused.outcome == "refused"
    assert "signature: docstrings@v0.1.0 is not signed by anybody in ../signers" in refused.sentence
    project.git("tag", "--delete", "docstrings@v0.1.0")
    monkeypatch.setenv(VARIABLE, str(key("ada")))
    project.register()
    promotion = promote(project.params, project.paths)
    assert promotion.outcome == "promoted"
    assert signature(of(project), "docstrings#champion#1", signers) == Signature("ada@example.org")
    again = promote(project.params, project.paths)
    assert (again.outcome, again.report) == ("already", promotion.report)
    signers.unlink()
    project.git("tag", "--delete", "docstrings#champion#1")
    with pytest.raises(RegistryError, match=r"gate\.allowed_signers is \.\./signers, and there is no file"):
        promote(project.params, project.paths)


# -- approvals -------------------------------------------------------------------------------------------------------


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
    gto = Path(sys.executable).with_name("gto")
    shown = subprocess.run([gto, "show", "--json"], cwd=project.root, check=True, capture_output=True)
    assert list(json.loads(shown.stdout)) == ["docstrings"], "GTO passes approvals over"
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


def test_promotion_waits_for_approvals(project: Any, tmp_path: Path) -> None:
    text = "project: {name: docstrings}\nregister: {remote: local}\ngate: {approvals: 1}\n"
    (project.root / "params.yaml").write_text(text)
    project.register()
    refused = promote(project.params, project.paths)
    assert "approval: 0 of 1; people other than who registered it approve it with `peftcore approve" in refused.sentence
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
def test_unsigned_tags_give_and_take_no_stage_where_signers_are_listed(project: Any, key: Key, signers: Path) -> None:
    registry = of(project, key("ada"))
    first, second = add(registry), add(registry, "v0.2.0")
    registry.assign("champion", first, 0, "promoted\n")
    project.git("tag", "--annotate", "--message=mine", "docstrings#champion#99", f"{second.tag}^{{}}")
    gate = Gate(allowed_signers=str(signers))
    assert registry.stages()["champion"].version == "v0.2.0", "anybody's tags count where nobody is listed"

    def holder() -> str | None:
        trusting = Registry(Git(project.root), "docstrings", decides=deciding_tags(gate, Git(project.root)))
        assert trusting.last_event() >= 99, "the number is taken all the same"
        held = trusting.stages().get("champion")
        assert [one.version for one in trusting.holders("champion")] == ["v0.1.0"]
        return held and held.version

    assert holder() == "v0.1.0"
    project.git("tag", "--annotate", "--message=mine", "docstrings#champion!#100", f"{first.tag}^{{}}")
    project.git("tag", "--annotate", "--message=mine", "docstrings@v0.1.0!#101", f"{first.tag}^{{}}")
    assert holder() == "v0.1.0"


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
