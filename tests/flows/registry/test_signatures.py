"""Signed tags with real ssh keys and real git: only listed people count, for what they signed."""

import json
from pathlib import Path
from typing import Any

import pytest
from gto_command import run_gto
from registries import Key, add, needs_keys, of, signature

from flows.errors import RegistryError
from flows.gate.promote import promote
from flows.registry.signatures import VARIABLE, Signature, signing_key


@needs_keys
def test_a_tag_is_signed_by_whom_the_list_names_and_reads_as_before(project: Any, key: Key, signers: Path) -> None:
    registry = of(project, key("ada"))
    version = add(registry)
    assert signature(registry, version.tag, signers) == Signature("ada@example.org")
    assert version.content == "a" * 64
    assert version.message == "docstrings v0.1.0: good\n\nAdapter: sha256:" + "a" * 64 + "\n", "without the signature"
    tag = registry.assign("champion", version, 0, "promoted\n")
    assert signature(registry, tag, signers) == Signature("ada@example.org")
    assert json.loads(run_gto(project.root, "show", "--json"))["docstrings"]["stage"]["champion"] == "v0.1.0"


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
    with pytest.raises(RegistryError, match=r"`peftcore stage register --force` registers the last run again"):
        promote(project.params, project.paths)
    monkeypatch.setenv(VARIABLE, str(key("ada")))
    project.register()
    promotion = promote(project.params, project.paths)
    assert promotion.outcome == "promoted"
    assert signature(of(project), "docstrings#champion#1", signers) == Signature("ada@example.org")
    again = promote(project.params, project.paths)
    assert (again.outcome, again.report) == ("already", promotion.report)
    signers.unlink()
    project.git("tag", "--delete", "docstrings#champion#1")
    with pytest.raises(RegistryError, match=r"gate\.allowed_signers is \.\./signers, but the file"):
        promote(project.params, project.paths)
