"""Files of a registered version: those of its run, whatever the working tree has, and refused if they are damaged."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from flows.errors import RegistryError
from flows.registry.project_registry import registry_of
from flows.registry.registered_files import check_adapter, dvc_digest, files_of


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def damage(project: Any, original: Path) -> None:
    """Change the object with the content of `original` in DVC's cache."""
    content = original.read_bytes()
    (found,) = [
        path for path in (project.root / ".dvc" / "cache").rglob("*") if path.is_file() and path.read_bytes() == content
    ]
    original.unlink()  # it may be a link to the object
    found.chmod(0o644)
    found.write_bytes(content + b" ")


def test_a_folders_digest_is_dvcs_own(registered: Any, tmp_path: Path) -> None:
    lock = YAML(typ="safe").load(registered.root / "dvc.lock")
    outs = {out["path"]: out["md5"] for out in lock["stages"]["make"]["outs"]}
    for name in ("adapter", "data", "evaluation"):
        assert dvc_digest(registered.root / "artifacts" / name) == outs[f"artifacts/{name}"]
    copy = shutil.copytree(registered.paths.data, tmp_path / "copy")
    (copy / "more.txt").touch()
    assert dvc_digest(copy) != outs["artifacts/data"]


def test_files_are_those_of_the_version_and_gone_afterwards(registered: Any) -> None:
    paths = registered.paths
    registry, then = registry_of(registered.params, registered.root), contents(paths.evaluation)
    first = registry.version("v0.1.0")
    registered.make(loss=2.5, weight=3.0)
    assert contents(paths.evaluation) != then
    with files_of(paths, registry, first, [paths.evaluation, paths.data, paths.adapter]) as at:
        assert contents(at.evaluation) == then
        assert at.data_report.exists() and not at.merge_report.exists(), "what is asked for, and nothing else"
        check_adapter(at.adapter, registry, first)
        with pytest.raises(RegistryError, match=r"adapter_model\.safetensors of docstrings@v0\.1\.0 differs"):
            check_adapter(paths.adapter, registry, first)
    assert not at.root.exists()


def test_an_adapter_that_lacks_a_registered_file_is_refused(registered: Any, tmp_path: Path) -> None:
    registry = registry_of(registered.params, registered.root)
    copy = shutil.copytree(registered.paths.adapter, tmp_path / "copy")
    (copy / "README.md").write_text("a card is no registered file\n")
    check_adapter(copy, registry, registry.version("v0.1.0"))
    (copy / "adapter_config.json").unlink()
    with pytest.raises(RegistryError, match=r"adapter_config\.json of docstrings@v0\.1\.0 differs .*roll back"):
        check_adapter(copy, registry, registry.version("v0.1.0"))


@pytest.mark.parametrize(
    ("name", "named"),
    [("evaluation/metrics.json", "artifacts/evaluation/metrics.json"), ("data/report.json", "artifacts/data")],
)
def test_evidence_and_data_that_dvc_gives_otherwise_than_registered_are_refused(
    registered: Any, name: str, named: str
) -> None:
    paths = registered.paths
    registry = registry_of(registered.params, registered.root)
    damage(registered, paths.artifacts / name)
    with (
        pytest.raises(RegistryError, match=rf"{named} of docstrings@v0\.1\.0 differs from the registered file: DVC's"),
        files_of(paths, registry, registry.version("v0.1.0"), [paths.evaluation, paths.data]),
    ):
        pass
