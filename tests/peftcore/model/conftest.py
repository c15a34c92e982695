"""A model with two adapters, in tests that run with HF PEFT installed and without."""

import sys
from typing import Any

import pytest
from two_adapters import two_adapters


@pytest.fixture(params=[True, False], ids=["with peft", "without"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if not request.param:
        monkeypatch.setitem(sys.modules, "peft", None)

        def absent(*_: Any, **__: Any) -> None:
            raise ImportError("peft is not installed")

        monkeypatch.setattr("transformers.integrations.peft.check_peft_version", absent)
    return two_adapters()
