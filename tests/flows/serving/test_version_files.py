"""The adapter of a registered version is copied as it was registered, or refused."""

from pathlib import Path
from typing import Any

import pytest

from flows.errors import RegistryError
from flows.registry.project_registry import registry_of
from flows.serving.version_files import adapter_files


def test_a_versions_adapter_is_copied_and_a_damaged_one_is_refused(registered: Any, tmp_path: Path) -> None:
    registry = registry_of(registered.params, registered.root)
    version = registry.version("v0.1.0")
    directory = adapter_files(registered.paths, registry, version, tmp_path)
    expected = {file.name: file.read_bytes() for file in registered.paths.adapter.iterdir() if file.is_file()}
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == expected

    config = expected["adapter_config.json"]
    for path in (registered.root / ".dvc" / "cache").rglob("*"):
        if path.is_file() and path.read_bytes() == config:
            path.chmod(0o644)
            path.write_text('{"peft_type": "LORA" }')
    with pytest.raises(RegistryError, match=r"adapter_config\.json of docstrings@v0\.1\.0 is not what was registered"):
        adapter_files(registered.paths, registry, version, tmp_path / "again")
