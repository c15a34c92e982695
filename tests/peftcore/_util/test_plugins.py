"""Modules of a package and entry points of a group are imported once."""

import importlib.metadata
import sys
from pathlib import Path

import pytest

from peftcore._util.plugins import import_plugins


def test_every_module_and_entry_point_is_imported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "plugins_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("imported = []\n")
    for name in ("one", "two"):
        (package / f"{name}.py").write_text(f"from plugins_of_a_test import imported\nimported.append({name!r})\n")
    loaded: list[str] = []

    class Entry:
        def load(self) -> None:
            loaded.append("entry")

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [Entry()] if group == "a.group" else [])
    for _ in range(2):
        import_plugins(("plugins_of_a_test",), "a.group")
    assert sorted(sys.modules["plugins_of_a_test"].imported) == ["one", "two"] and loaded == ["entry"]
