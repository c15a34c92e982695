"""A version's record comes out of git: one that somebody forged is refused before any of it is used."""

import json
from pathlib import Path
from typing import Any

import pytest

from flows.errors import RegistryError
from flows.gate.promote import promote
from flows.registry.registry import RECORD, Registry
from flows.runtime.git import Git

DIGEST = "0" * 64


def forge(project: Any, text: str) -> Registry:
    """A registry whose newest version, v9.0.0, is v0.1.0 but for its record."""
    git = Git(project.root)
    registry = Registry(git, "docstrings")
    contents = {RECORD: text, "dvc.lock": git.show(registry.version("v0.1.0").commit, "dvc.lock")}
    commit = git.snapshot([], [], contents, "Forged")
    git.create_tag("docstrings@v9.0.0", commit, f"docstrings v9.0.0\n\nAdapter: sha256:{DIGEST}\n", after=0)
    return registry


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["evidence"], {"../../outside": DIGEST}),
        (["evidence"], {"/etc/passwd": DIGEST}),
        (["adapter", "files"], {"..\\outside": DIGEST}),
        (["adapter", "files"], {"adapter_model.safetensors": "no digest"}),
        (["adapter"], None),
        (["dvc"], {"../outside": "0"}),
        (["params", "train"], ["a list"]),
        (["metrics"], {"base": {"loss": "much"}, "adapter": {}}),
        (["git", "uncommitted"], "a text"),
    ],
)
def test_a_forged_part_is_named(registered: Any, tmp_path: Path, path: list[str], value: Any) -> None:
    record = json.loads(registered.paths.version.read_text())
    part = record
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    registry = forge(registered, json.dumps(record))
    with pytest.raises(RegistryError, match=rf"docstrings@v9\.0\.0 has no readable .*\n{path[0]}"):
        registry.record(registry.version("v9.0.0"))
    with pytest.raises(RegistryError):
        promote(registered.params, registered.paths, "v9.0.0")
    assert not (tmp_path / "outside").exists() and registry.stages() == {}


@pytest.mark.parametrize("text", ["[]", "null", "{", "[" * 100_000, '{"name": 1}'])
def test_what_is_no_record_is_refused(registered: Any, text: str) -> None:
    registry = forge(registered, text)
    with pytest.raises(RegistryError, match="no readable"):
        registry.record(registry.version("v9.0.0"))
