"""Modules of peftcore pickle as an import, although peftcore is not installed in site-packages."""

import pickle
import sys
from importlib import import_module
from pkgutil import walk_packages
from types import ModuleType
from typing import Any

import pytest
from datasets.fingerprint import Hasher

import peftcore
from peftcore import hf_peft
from peftcore.errors import MissingExtraError

dill, cloudpickle = pytest.importorskip("dill"), pytest.importorskip("cloudpickle")


def modules() -> list[ModuleType]:
    imported = []
    for module in walk_packages(peftcore.__path__, "peftcore."):
        if module.name == "peftcore.as_peft" or module.name.endswith(".__main__"):  # their imports change the process
            continue
        try:
            imported.append(import_module(module.name))
        except (MissingExtraError, ImportError):  # an optional package is missing
            continue
    generated = [import_module("peftcore.hf_peft.tuners.vera"), import_module("peftcore.hf_peft.tuners.vera.layer")]
    return [peftcore, *imported, *generated]


@pytest.mark.parametrize(
    "dumps", [pickle.dumps, cloudpickle.dumps, dill.dumps, lambda module: dill.dumps(module, recurse=True)]
)
def test_every_module_pickles_as_an_import(dumps: Any) -> None:
    for module in modules():
        saved = dumps(module)
        assert len(saved) < 200, module.__name__
        assert pickle.loads(saved) is module


def test_a_function_that_uses_a_module_has_one_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets.Dataset.map` finds its earlier result by this hash, so the use of peftcore must not change the hash."""
    monkeypatch.setattr(sys.modules[__name__], "__name__", "__main__")
    function = eval("lambda row: (peft.PeftModel, peftcore.train)", {"peft": hf_peft, "peftcore": peftcore})
    before = Hasher.hash(function)
    modules()
    assert Hasher.hash(function) == before
