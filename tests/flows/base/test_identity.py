"""A base is its weights, configuration and tokenizer; not the release of transformers that saved it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from flows.base.identity import base_identity, have_same_base, is_base
from flows.errors import BaseModelError
from peftcore.files import MANIFEST, sha256, write_manifest


def base(folder: Path, weights: bytes = b"weights", **config: Any) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, "text_config": {}} | config))
    write_manifest(folder)
    return folder


def evaluation(folder: Path) -> dict[str, str]:
    return {"base_model": base_identity(folder), "base_manifest": sha256(folder / MANIFEST)}


def test_another_release_of_transformers_is_the_same_base(tmp_path: Path) -> None:
    one = base(tmp_path / "one", transformers_version="4.50.0", text_config={"transformers_version": "4.50.0"})
    other = base(tmp_path / "other", transformers_version="5.0.0", text_config={"transformers_version": "5.0.0"})
    assert evaluation(one)["base_manifest"] != evaluation(other)["base_manifest"]
    assert have_same_base(evaluation(one), evaluation(other))
    assert is_base(one, evaluation(other))


@pytest.mark.parametrize("changes", [{"weights": b"others"}, {"hidden_size": 16}])
def test_other_weights_or_another_configuration_are_another_base(tmp_path: Path, changes: dict[str, Any]) -> None:
    one, other = base(tmp_path / "one"), base(tmp_path / "other", **changes)
    assert not have_same_base(evaluation(one), evaluation(other))
    assert not is_base(one, evaluation(other)) and not is_base(tmp_path, evaluation(one))


def test_records_from_before_identities_still_compare(tmp_path: Path) -> None:
    folder = base(tmp_path / "one", transformers_version="4.50.0")
    old = {"base_model": hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()}
    for before in (old, old | {"base_manifest": None}):
        assert have_same_base(evaluation(folder), before) and have_same_base(before, evaluation(folder))
        assert is_base(folder, before)
    assert not have_same_base(evaluation(folder), {"base_model": "0" * 64})


def test_a_configuration_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = base(tmp_path / "one")
    (folder / "config.json").write_text("{")
    with pytest.raises(BaseModelError, match=r"config\.json cannot be read"):
        base_identity(folder)
