"""A module is changed when it is imported, and not before."""

import sys
from pathlib import Path
from typing import Any

import pytest

from peftcore._util.after_import import after_import


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "changed_later.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield "changed_later"
    sys.modules.pop("changed_later", None)


def change(module: Any) -> None:
    module.value += 1


def test_the_action_waits_for_the_import_and_runs_once(package: str) -> None:
    finders = len(sys.meta_path)
    after_import(package, "value", change)
    after_import(package, "value", change)
    assert package not in sys.modules and len(sys.meta_path) == finders + 1
    module = __import__(package)
    assert module.value == 2 and len(sys.meta_path) == finders


def test_two_actions_both_run(package: str) -> None:
    after_import(package, "value", change)
    after_import(package, "value", lambda module: setattr(module, "other", True))
    module = __import__(package)
    assert module.value == 2 and module.other


def test_a_module_that_is_there_is_changed_at_once(package: str) -> None:
    module = __import__(package)
    after_import(package, "value", change)
    assert module.value == 2
