"""Adapters on layers whose weights accelerate has offloaded compute what they compute without offloading."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_submodules
from method_example import examples, randomise
from quiet_training import tiny_llama
from torch import Tensor, nn

from peftcore import (
    CheckpointError,
    ConfigError,
    IA3Config,
    LoraConfig,
    MergeError,
    OFTConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
    set_peft_model_state_dict,
)
from peftcore import get_peft_model_state_dict as state_of
from peftcore.registry import methods

CPU = torch.device("cpu")
TOKENS = torch.arange(6)[None]
METHODS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    "dora": lambda: LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, use_dora=True),
    "embedding": lambda: LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False),
    "vera": lambda: VeraConfig(r=2, target_modules=["q_proj"], init_weights=False),
    "ia3": lambda: IA3Config(target_modules=["q_proj"], feedforward_modules=[], init_ia3_weights=False),
    "oft": lambda: OFTConfig(target_modules=["q_proj"], r=2, oft_block_size=0, init_weights=False),
}


def llama() -> Any:
    torch.manual_seed(0)
    return tiny_llama().eval()


def adapted(base: nn.Module, method: str) -> Any:
    torch.manual_seed(1)
    return get_peft_model(base, METHODS[method]()).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(TOKENS).logits


def offload(model: nn.Module, place: str, folder: Path) -> None:
    if place == "memory":
        cpu_offload(model, execution_device=CPU)
    else:
        disk_offload(model, str(folder), execution_device=CPU)


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("first", ["adapter", "offload"])
@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_merges_are_those_without_offloading(method: str, first: str, place: str, tmp_path: Path) -> None:
    expected = logits(plain := adapted(llama(), method))
    state = {key: tensor.clone() for key, tensor in state_of(plain).items() if "base_layer" not in key}
    with plain.disable_adapter():
        of_base = logits(plain)
    assert (expected - of_base).abs().max() > 1e-3
    base = llama()
    if first == "offload":
        offload(base, place, tmp_path)
    model = adapted(base, method)
    if first == "adapter":
        offload(model, place, tmp_path)
    assert base.model.layers[0].mlp.up_proj.weight.is_meta
    torch.testing.assert_close(logits(model), expected)
    assert all(torch.equal(state_of(model)[key], tensor) for key, tensor in state.items())
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), of_base)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected)


def test_a_saved_adapter_is_loaded_onto_an_offloaded_base(tmp_path: Path) -> None:
    expected = logits(model := adapted(llama(), "lora"))
    model.save_pretrained(tmp_path)
    base = llama()
    cpu_offload(base, execution_device=CPU)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, str(tmp_path)).eval()), expected)


def test_a_module_without_weights_is_not_copied() -> None:
    cpu_offload(base := llama(), execution_device=CPU)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ConfigError, match=r"accelerate has offloaded the weights of 'lm_head'.*adapter first"):
        get_peft_model(base, config)


def test_what_cannot_be_saved_says_how_to_bring_the_values_back(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model: Any = get_peft_model(llama(), config)
    expected = model.base_model.model.lm_head.modules_to_save["default"].weight.clone()
    cpu_offload(model, execution_device=CPU)
    with pytest.raises(CheckpointError, match=r"call accelerate\.hooks\.remove_hook_from_submodules"):
        model.save_pretrained(tmp_path)
    remove_hook_from_submodules(model)
    model.save_pretrained(tmp_path)
    saved = PeftModel.from_pretrained(llama(), str(tmp_path)).base_model.model.lm_head.modules_to_save["default"]
    assert torch.equal(saved.weight, expected)


# -- every method, on one layer --------------------------------------------------------------------------------------

EXAMPLES = {name: example for name, example in examples().items() if not example.whole_model}
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(16, 16), lambda: torch.randn(3, 16)),
    "embedding": (lambda: nn.Embedding(8, 16), lambda: torch.arange(5)),
    "norm": (lambda: nn.LayerNorm(16), lambda: torch.randn(3, 16)),
}
CASES = [
    pytest.param(name, kind, id=f"{name}-{kind}")
    for name in EXAMPLES
    for kind in LAYERS
    if kind in methods()[name].adapter.layer_kinds
]


def on_one_layer(method: str, kind: str, offloaded_first: bool) -> Any:
    torch.manual_seed(0)
    base = nn.Sequential(LAYERS[kind][0]()).eval()
    if offloaded_first:
        cpu_offload(base, execution_device=CPU)
    torch.manual_seed(1)
    model = get_peft_model(base, EXAMPLES[method].make(target_modules=["0"]))
    torch.manual_seed(2)
    randomise(model, EXAMPLES[method].spread)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("first", [True, False], ids=["offloaded then adapted", "adapted then offloaded"])
@pytest.mark.parametrize(("method", "kind"), CASES)
def test_every_method_on_an_offloaded_layer(method: str, kind: str, first: bool) -> None:
    plain, model, x = on_one_layer(method, kind, False), on_one_layer(method, kind, first), LAYERS[kind][1]()
    expected = plain(x)
    if not first:
        cpu_offload(model, execution_device=CPU)
    assert model[0].base_layer.weight.is_meta
    for _ in range(2):
        torch.testing.assert_close(model(x), expected)
    values = {key: tensor / 2 for key, tensor in state_of(plain).items()}
    for one in (plain, model):
        set_peft_model_state_dict(one, values)
    expected = plain(x)
    torch.testing.assert_close(model(x), expected)
    try:
        plain.merge_adapter()
    except MergeError:
        return  # its change depends on the input
    model.merge_adapter()
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected)
