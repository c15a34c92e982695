"""Which adapters act and train; the cost of switching."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftcore import AdapterNameError, ConfigError, LoraConfig, get_peft_model


def lora(*targets: str, **options: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, **options)


def net() -> Any:
    torch.manual_seed(0)
    return get_peft_model(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), lora("0"))


def test_adding_never_changes_another_adapter() -> None:
    model = net()
    model.set_requires_grad("default", False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    model.add_adapter("b", lora("0", "1"))
    model.set_adapter(["b", "default"])
    now = {n.replace("1.base_layer", "1"): p.requires_grad for n, p in model.named_parameters() if ".b." not in n}
    assert now == before
    assert all(p.requires_grad for n, p in model.named_parameters() if ".b." in n)


@pytest.mark.parametrize("name", ["o", "0", "base_layer", "weight", "lora_A", "default2"])
def test_loading_or_freezing_one_by_any_name_never_changes_another(name: str, tmp_path: Path) -> None:
    get_peft_model(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), lora("0", "1")).save_pretrained(tmp_path)
    model = net()

    def trained() -> dict[str, bool]:
        of_others = ((n, p) for n, p in model.named_parameters() if f".adapters.{name}." not in n)
        return {n.replace("1.base_layer", "1"): p.requires_grad for n, p in of_others}

    before = trained()
    for is_trainable in (False, True):
        model.load_adapter(tmp_path, name, is_trainable=is_trainable)
        own = [p.requires_grad for n, p in model.named_parameters() if f".adapters.{name}." in n]
        assert trained() == before and own == [is_trainable] * 4
        model.set_requires_grad(name, not is_trainable)
        assert trained() == before
        model.delete_adapter(name)
    assert trained() == before


@pytest.mark.parametrize("layers, adapters", [(2, 2), (60, 20)])
def test_switching_touches_no_module(layers: int, adapters: int) -> None:
    """Constant cost: no attribute of any module is read or written, whatever their number."""
    model = get_peft_model(nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers))), lora(*map(str, range(layers))))
    for i in range(adapters):
        model.add_adapter(f"a{i}", lora("0"))
    touched: list[str] = []

    def watch(self: nn.Module, name: str) -> Any:
        touched.append(name)
        return object.__getattribute__(self, name)

    classes = {type(m) for m in model.modules() if m is not model}
    try:
        for cls in classes:
            cls.__getattribute__ = watch  # type: ignore[method-assign]
        model.set_adapter("a0")
    finally:
        for cls in classes:
            if "__getattribute__" in cls.__dict__:
                del cls.__getattribute__
    assert model.active_adapters == ["a0"] and touched == []


def test_names_that_are_not_there() -> None:
    model = net()
    for call in (model.set_adapter, model.delete_adapter, model.set_requires_grad):
        with pytest.raises(AdapterNameError, match="no adapter named 'x'; loaded: default"):
            call("x")
    with pytest.raises(AdapterNameError, match="at most once"):
        model.set_adapter(["default", "default"])
    with pytest.raises(AdapterNameError, match="already an adapter named 'default'"):
        model.add_adapter("default", lora("0"))
    assert model.active_adapters == ["default"] == model.active_adapters()


def test_disable_is_restored_after_an_exception() -> None:
    model, x = net(), torch.randn(2, 6)
    before = model(x)
    with pytest.raises(RuntimeError), model.disable_adapter():
        raise RuntimeError
    assert torch.equal(model(x), before)


def test_modules_to_save_has_one_acting_copy_and_the_original_without() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), lora("0", modules_to_save=["1"]))
    model.add_adapter("b", lora("0"))
    x = torch.randn(2, 6)
    original = model[1].base_layer.weight
    with torch.no_grad():
        model[1].copies["default"].weight.add_(1.0)
    assert not torch.equal(model[1].weight, original), "the acting copy's weight is what model code reads"
    model.set_adapter("b")
    assert torch.equal(model[1].weight, original)
    model.set_adapter("default")
    adapted = model(x)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), adapted)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch.compile's own import of itself
def test_attaching_after_compile_is_refused() -> None:
    compiled = torch.compile(nn.Sequential(nn.Linear(6, 6)))
    with pytest.raises(ConfigError, match=r"before torch\.compile"):
        get_peft_model(compiled, lora("0"))
