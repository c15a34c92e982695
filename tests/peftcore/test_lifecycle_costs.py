"""No operation does more because more adapters are loaded, and none walks over the model more than once.

Counted, not timed: every call of a Python or C function.
"""

import copy
import gc
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftcore import LoraConfig, PeftModel, get_peft_model
from peftcore.injection import module_index as module_index
from peftcore.storage import checkpoint
from peftcore.storage.checkpoint import adapter_tensors


def net(layers: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers)))


def config(**options: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["0", "1", "3"], init_lora_weights=False, **options)


def disabled(model: Any) -> None:
    with model.disable_adapter():
        pass


def calls_in(operation: Callable[[], Any]) -> int:
    """Calls of Python and C functions while it runs; the collector of garbage calls some at times of its own."""
    count = 0

    def note(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()
    sys.setprofile(note)
    try:
        operation()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


Operation = Callable[[Any, Path], Any]
OPERATIONS: dict[str, Operation] = {
    "load": lambda model, folder: model.load_adapter(folder / "saved", "last"),
    "add": lambda model, _: model.add_adapter("other", config()),
    "switch": lambda model, _: model.set_adapter("last"),
    "switch to two": lambda model, _: model.set_adapter(["other", "last"]),
    "disable": lambda model, _: disabled(model),
    "train": lambda model, _: model.set_requires_grad("last", True),
    "state dict": lambda model, _: adapter_tensors(model, "last"),
    "save": lambda model, folder: model.save_pretrained(folder / "again", selected_adapters=["last"]),
    "read again": lambda model, folder: model.load_adapter_weights(folder / "saved", "last"),
    "merge": lambda model, _: model.merge_adapter(["last"]),
    "disable while merged": lambda model, _: disabled(model),
    "unmerge": lambda model, _: model.unmerge_adapter(),
    "delete": lambda model, _: model.delete_adapter("last"),
}
"""In order: each finds what the ones before have left."""


def with_adapters(count: int, folder: Path) -> Any:
    model = get_peft_model(net(), config(modules_to_save=["2"]))
    model.save_pretrained(folder / "saved")
    for number in range(1, count):
        model.load_adapter(folder / "saved", f"a{number}")
    return model


class AtOnce:
    """An executor that computes where it is asked: waiting for another thread takes calls by chance."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> "AtOnce":
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        done: Future[Any] = Future()
        done.set_result(function(*arguments))
        return done


def test_calls_do_not_grow_with_the_adapters_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "ThreadPoolExecutor", AtOnce)
    counts = {}
    for loaded in (1, 1, 2, 12):  # the first fills caches
        model = with_adapters(loaded, tmp_path).eval()  # loading onto a model that trains looks at all of it
        counts[loaded] = {name: calls_in(lambda o=op: o(model, tmp_path)) for name, op in OPERATIONS.items()}  # noqa: B023
    assert counts[2] == counts[1]
    assert counts[12] == counts[2]


@pytest.mark.parametrize("name", OPERATIONS)
def test_one_walk_at_most(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, walks = with_adapters(3, tmp_path), []
    for before, operation in OPERATIONS.items():
        if before == name:
            break
        operation(model, tmp_path)
    watch(model, walks, monkeypatch)
    OPERATIONS[name](model, tmp_path)
    assert len(walks) <= (name in ("load", "add", "save"))  # to save, names are compared with those of all modules


def test_one_walk_at_the_first_injection_and_when_the_last_adapter_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[str] = []
    model = net()
    watch(model, walks, monkeypatch)
    adapted = get_peft_model(model, config(modules_to_save=["2"]))
    assert len(walks) == 1
    adapted.delete_adapter("default")
    assert len(walks) == 2


def watch(model: nn.Module, walks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Note every walk that begins at the model."""
    own, torchs = module_index.original_modules, nn.Module.named_modules

    def ours(module: nn.Module, prefix: str = "") -> Any:
        walks.extend(["ours"] * (module is model))
        return own(module, prefix)

    def theirs(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        walks.extend(["torch's"] * (self is model))
        return torchs(self, *args, **kwargs)

    monkeypatch.setattr(module_index, "original_modules", ours)
    monkeypatch.setattr(nn.Module, "named_modules", theirs)


@pytest.mark.parametrize("named_whole", [True, False])
def test_calls_grow_in_proportion_to_the_layers(named_whole: bool, tmp_path: Path) -> None:
    """A name of a layer is looked up, not compared with every other; twice the layers are twice the calls."""
    counts = []
    for layers in (40, 40, 80, 160):
        names = [str(number) for number in range(layers)] if named_whole else "all-linear"
        model = get_peft_model(net(layers), LoraConfig(r=2, target_modules=names))
        model.save_pretrained(tmp_path / str(layers))
        plain = copy.deepcopy(net(layers))
        counts.append(calls_in(lambda p=plain, n=layers: PeftModel.from_pretrained(p, tmp_path / str(n))))
    _, one, two, four = counts
    assert four - two == pytest.approx(2 * (two - one), rel=0.05)
