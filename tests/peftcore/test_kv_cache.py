"""`peftcore.kv_cache`: answers are those with transformers' cache, in memory that is seldom reserved."""

import itertools
from typing import Any

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from peftcore.kv_cache import ROOM, GrowingLayer, growing_cache


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 6}
    return MistralForCausalLM(MistralConfig(**sizes, **heads)).double().eval()


PROMPTS = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": ROOM + 20},
        {"num_beams": 3, "max_new_tokens": 20},
        {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 20},
        {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 20},
        {"prompt_lookup_num_tokens": 3, "max_new_tokens": 20},
    ],
    ids=str,
)
def test_answers_are_those_with_transformers_cache(model: Any, options: dict[str, Any]) -> None:
    answers, prompts = [], PROMPTS[:1] if "prompt_lookup_num_tokens" in options else PROMPTS
    for cache in (DynamicCache(), growing_cache()):
        torch.manual_seed(2)
        answers.append(model.generate(prompts, cache=cache, eos_token_id=None, pad_token_id=0, **options))
    assert torch.equal(*answers)


@torch.no_grad()
def test_a_step_reserves_no_memory(model: Any) -> None:
    cache, places = growing_cache(), []
    for _ in range(2 * ROOM + 4):  # the first forward reserves memory for itself and ROOM further tokens
        model(PROMPTS[:, :1], cache=cache, use_cache=True)
        layer: Any = cache.layers[1]
        places.append(layer.keys.data_ptr())
    assert len(cache.layers) == 2 and cache.get_seq_length() == 2 * ROOM + 4
    assert sum(before != after for before, after in itertools.pairwise(places)) == 2


def test_rows_can_be_selected_between_two_steps() -> None:
    """Methods of `DynamicLayer` that replace keys and values are followed."""
    layer, keys = GrowingLayer(), torch.arange(24.0).view(3, 1, 4, 2)
    layer.update(keys, -keys)
    layer.reorder_cache(torch.tensor([2, 2, 0]))
    more = torch.ones(3, 1, 1, 2)
    found, values = layer.update(more, more)
    assert torch.equal(found, torch.cat([keys[[2, 2, 0]], more], 2))
    assert torch.equal(values, torch.cat([-keys[[2, 2, 0]], more], 2))
    layer.batch_select_indices(torch.tensor([1]))
    layer.crop(-1)
    found, _ = layer.update(2 * more[:1], more[:1])
    assert torch.equal(found, torch.cat([keys[[2]], 2 * more[:1]], 2))
