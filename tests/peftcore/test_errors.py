"""A feature whose optional packages are missing is refused in one line that has the command."""

import importlib
import sys

import pytest
import torch

from peftcore.errors import MissingExtraError, PeftError, require_extra
from peftcore.methods.lora.variants.loftq import _quantised


def test_what_is_installed_is_not_imported() -> None:
    before = set(sys.modules)
    require_extra("train", "peftcore.train", "json", "this")
    assert set(sys.modules) - before == set()


def test_the_message_names_what_is_missing_and_the_command() -> None:
    with pytest.raises(MissingExtraError) as refusal:
        require_extra("serve", "peftcore.serving", "json", "no_such_a", "no_such_b")
    told = str(refusal.value)
    assert told == "peftcore.serving needs no_such_a, no_such_b; install with: pip install 'peftcore[serve]'"
    assert isinstance(refusal.value, PeftError) and isinstance(refusal.value, ImportError)


def test_a_long_list_is_cut() -> None:
    with pytest.raises(MissingExtraError, match="needs x0, x1, x2, x3 and 3 more packages; install"):
        require_extra("pipeline", "the command", *(f"x{i}" for i in range(7)))


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("peftcore.train", "accelerate", "train"),
        ("peftcore.serving", "uvicorn", "serve"),
        ("peftcore.export", "gguf", "export"),
    ],
)
def test_a_package_without_its_extra(module: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftcore.errors.find_spec", lambda name: None if name == package else object())
    for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingExtraError, match=rf"^{module} needs {package}; .*'peftcore\[{extra}\]'$"):
        importlib.import_module(module)


def test_loftq_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftcore.errors.find_spec", lambda name: None)
    with pytest.raises(
        MissingExtraError, match=r"^init_lora_weights='loftq' needs bitsandbytes; .*'peftcore\[quant\]'$"
    ):
        _quantised(torch.ones(4, 4), bits=4)
    assert torch.equal(_quantised(torch.ones(4, 4), bits=8), torch.ones(4, 4)), "int8 needs no package"
