"""Simulated activations against those of a real forward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from resource_cases import batch, params
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from flows.resources.activations import activations
from flows.resources.sizes import sized_adapter, with_blocks
from peftcore import get_peft_model
from peftcore.train import recompute_activations


@pytest.mark.parametrize("mode", ["none", "selective", "blocks"])
def test_simulated_activations_are_what_a_forward_saves(mode: Any) -> None:
    config = LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=192, num_hidden_layers=6, num_attention_heads=4,
    )  # fmt: skip
    chosen = params(train={"gradient_checkpointing": mode}, quantization={"storage": "none"})
    found = activations(config, chosen, batch(2, 48), 48, 10)
    model: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    model = get_peft_model(model, sized_adapter(chosen, 10)).train()
    recompute_activations(model, mode)
    saved = _saved_bytes(model, lambda: model.base_model(torch.full((2, 48), 5), use_cache=False)[0])
    assert found.kept == pytest.approx(saved, rel=0.06)
    if mode == "blocks":  # one block's activations come back while its input's gradient is computed
        assert found.working > 0.5 * activations(with_blocks(config, 1), params(), batch(2, 48), 48, 10).kept


def _saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
    total = sum(storages.values())
    del kept
    return total


def test_two_depths_tell_of_any_other() -> None:
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4)
    chosen = params(train={"gradient_checkpointing": "selective"})
    two, four, six = (activations(with_blocks(config, n), chosen, batch(2, 32), 32, 10).kept for n in (2, 4, 6))
    assert six - four == four - two > 0
