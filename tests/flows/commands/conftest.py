"""A project with a registered version, as the current folder."""

from typing import Any

import pytest


@pytest.fixture
def here(registered: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`registered`; the current folder is one below its root, from which every command works as well."""
    monkeypatch.chdir(registered.root / "source")
    return registered
