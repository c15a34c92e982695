"""Blocks of earlier prompts are found again, by their own model alone, and stay below the limit of memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from peftcore import LoraConfig
from peftcore.serving import Limits
from peftcore.serving.kv_cache import KVCache
from peftcore.serving.prefix_cache import BLOCK, PrefixCache, joined

SIZE = 2 * 2 * 3 * BLOCK * 4
"""Bytes of one block of `layers`: keys and values, 2 heads of width 3, float32."""


def layers(prompt: list[int]) -> Any:
    """One layer whose keys and values are the tokens, and one without any."""
    keys = torch.tensor(prompt, dtype=torch.float32).expand(2, 3, -1).mT
    return [(keys, -keys), None]


def prompt_of(*blocks: int, more: int = 0) -> list[int]:
    return [number for number in blocks for _ in range(BLOCK)] + [99] * more


def test_the_longest_stored_beginning_is_found() -> None:
    cache = PrefixCache(100 * SIZE)
    cache.store("sql", prompt_of(1, 2, 3, more=5), layers(prompt_of(1, 2, 3, more=5)))
    cache.store("sql", prompt_of(1, 4), layers(prompt_of(1, 4)))
    assert cache.size == 4 * SIZE  # the first block is there once, and the five tokens are no block
    for prompt, found in (((1, 2, 3, 7), 3), ((1, 4, 3), 2), ((1, 5), 1), ((2, 3), 0)):
        blocks = cache.find("sql", prompt_of(*prompt))
        assert len(blocks) == found
        if found:
            tokens = found * BLOCK - 3
            (keys, values), none = joined(blocks, tokens)
            torch.testing.assert_close((keys, values), layers(prompt_of(*prompt)[:tokens])[0])
            assert none is None
    assert not cache.find("chat", prompt_of(1, 2, 3))


def test_the_least_recently_used_blocks_go_first_and_never_before_those_that_follow_them() -> None:
    cache = PrefixCache(4 * SIZE)
    cache.store("a", prompt_of(1, 2), layers(prompt_of(1, 2)))
    cache.store("b", prompt_of(1, 2), layers(prompt_of(1, 2)))
    cache.find("a", prompt_of(1, 2))
    cache.store("c", prompt_of(5), layers(prompt_of(5)))
    assert [len(cache.find(model, prompt_of(1, 2))) for model in "ab"] == [2, 1]
    long = prompt_of(*range(6))
    cache.store("d", long, layers(long))
    assert (cache.size, len(cache.find("d", long))) == (4 * SIZE, 4)


@pytest.mark.parametrize("limit", [None, SIZE - 1])
def test_without_room_nothing_is_stored(limit: int | None) -> None:
    cache = PrefixCache(limit)
    cache.store("a", prompt_of(1, 2), layers(prompt_of(1, 2)))
    assert (cache.size, cache.find("a", prompt_of(1, 2))) == (0, [])


def test_rows_of_a_cache_have_their_own_lengths() -> None:
    rows = [layers([1, 2, 3]), [], layers([4])]
    cache = KVCache.of_rows(rows, [3, 0, 1], torch.device("cpu"))
    assert cache.mask.tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 1]]
    (keys, _), none = cache.row(2, 1)  # type: ignore[misc]
    assert (keys[0, :, 0].tolist(), none) == ([4.0], None)


# -- in the engine --------------------------------------------------------------------------------------------------

SYSTEM = [5 + n * 7 % 190 for n in range(3 * BLOCK + 5)]


def test_prompts_with_a_common_beginning_are_exact_and_process_the_rest_only(serving: Callable[..., Any]) -> None:
    """Whatever is shared, partly or not at all, a request gets what `generate` gives it alone."""
    served = serving(limits=Limits(max_batch=4, prefill_tokens=64))
    jobs = [
        (name, [*SYSTEM[:shared], *range(20, 20 + rest)])
        for shared, rest in ((101, 9), (101, 3), (70, 40), (101, 60), (32, 1), (0, 4), (96, 0), (64, 7))
        for name in ("sql", "base", "mix", "dora")
    ]
    for _ in range(2):
        asked = [served.begin(name, prompt, 6) for name, prompt in jobs]
        for one, (name, prompt) in zip(asked, jobs, strict=True):
            assert one.result()[0] == served.world.expected(name, prompt, 6), (name, len(prompt))
    whole = 2 * sum(len(prompt) for _, prompt in jobs)
    reused = served.metric("peftcore_prefix_cache_tokens_total")
    assert reused > 0.5 * whole
    assert served.metric("peftcore_prompt_tokens_total") == whole - reused
    assert served.metric("peftcore_prefix_cache_bytes") > 0


def test_without_a_prefix_cache_every_token_is_processed(serving: Callable[..., Any]) -> None:
    served = serving(limits=Limits(prefix_cache=None))
    for _ in range(2):
        assert served.begin("sql", SYSTEM, 3).result()[0] == served.world.expected("sql", SYSTEM, 3)
    assert served.metric("peftcore_prompt_tokens_total") == 2 * len(SYSTEM)


def test_another_version_and_another_adapter_in_the_same_place_reuse_nothing(
    serving: Callable[..., Any], world: Any
) -> None:
    lora: dict[str, Any] = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "target_modules": "all-linear"}
    new = world.add("sql-next", LoraConfig(**lora), 77)
    world.add("twin", LoraConfig(**lora), 78)
    served = serving(max_loaded=1)  # so that each takes the other's place in the model
    store = served.service.catalog.store
    assert served.begin("sql", SYSTEM, 8).result()[0] == world.expected("sql", SYSTEM, 8)
    store.replace("sql", new)
    assert served.begin("sql", SYSTEM, 8).result()[0] == world.expected("sql-next", SYSTEM, 8)
    assert served.begin("twin", SYSTEM, 8).result()[0] == world.expected("twin", SYSTEM, 8)
    assert served.metric("peftcore_prefix_cache_tokens_total") == 0


def test_a_sliding_window_sees_reused_tokens_as_its_own(serving: Callable[..., Any], world: Any) -> None:
    """No padding is between reused tokens and others, which would shift a window that counts places."""
    torch.manual_seed(0)
    sizes = world.model.config.to_dict()
    config = MistralConfig(
        **{
            name: sizes[name]
            for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "initializer_range")
        },
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        sliding_window=24,
        eos_token_id=2,
        pad_token_id=0,
    )
    world.model = AutoModelForCausalLM.from_config(config).double().eval()
    served = serving(limits=Limits(max_batch=4))
    served.begin("base", SYSTEM, 1).result()
    prompts = [[*SYSTEM, *range(20, 50)], [*SYSTEM[:70], 9, 8], SYSTEM[:40], [3, 4, 5]]
    asked = [served.begin("base", prompt, 12) for prompt in prompts]
    for one, prompt in zip(asked, prompts, strict=True):
        assert one.result()[0] == world.expected("base", prompt, 12)
    assert served.metric("peftcore_prefix_cache_tokens_total") > 0
