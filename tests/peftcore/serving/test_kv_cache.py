"""Rows that join and leave between forwards compute what each computes alone."""

import random
from typing import Any

import torch
from torch import Tensor

from peftcore.kv_cache import ROOM
from peftcore.serving.kv_cache import KVCache


@torch.no_grad()
def forward(model: Any, cache: KVCache, tokens: Tensor, mask: Tensor) -> Tensor:
    logits = model(
        tokens,
        attention_mask=torch.cat([cache.mask, mask], 1),
        position_ids=cache.positions(mask),
        cache=cache.cache,
        use_cache=True,
    ).logits[:, -1]
    cache.extend(mask)
    return logits


def read(model: Any, *texts: list[int]) -> KVCache:
    longest = max(map(len, texts))
    cache = KVCache.empty(len(texts))
    tokens = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    forward(model, cache, tokens, mask)
    return cache


def test_any_joining_and_leaving_is_exact(world: Any) -> None:
    """Against the whole text read at once, in double precision."""
    model, chance = world.model, random.Random(0)
    texts: list[list[int]] = []
    cache = KVCache.empty(0)
    for turn in range(60):
        if chance.random() < 0.3 and len(texts) < 6:
            fresh = [chance.choices(range(3, 200), k=chance.randint(1, 20)) for _ in range(chance.randint(1, 3))]
            cache, texts = KVCache.join([cache, read(model, *fresh)]), texts + fresh
        if texts and chance.random() < 0.25:
            kept = sorted(chance.sample(range(len(texts)), chance.randint(0, len(texts) - 1)))
            cache, texts = cache.select(kept) if kept else KVCache.empty(0), [texts[row] for row in kept]
        if not texts:
            continue
        tokens = torch.randint(3, 200, (len(texts), 1))
        if turn % 7 == 0:  # a step that is taken back leaves nothing
            lengths = cache.length
            before = cache.mask
            forward(model, cache, torch.full_like(tokens, 5), torch.ones_like(tokens))
            cache.mask = before
            cache.discard_step()
            assert cache.length == lengths == cache.cache.get_seq_length()
        logits = forward(model, cache, tokens, torch.ones_like(tokens))
        texts = [[*text, int(token)] for text, token in zip(texts, tokens, strict=True)]
        assert cache.length >= max(map(len, texts))
        for text, row in zip(texts, logits, strict=True):
            with torch.no_grad():
                expected = model(torch.tensor([text])).logits[0, -1]
            torch.testing.assert_close(row, expected, atol=1e-10, rtol=0)


def test_padding_that_all_rows_have_goes(world: Any) -> None:
    cache = read(world.model, [5] * 40, [6] * 3, [7] * 9)
    left = cache.select([1, 2])
    assert (left.length, left.mask.sum(1).tolist(), left.cache.get_seq_length()) == (9, [3, 9], 9)


def test_memory_grows_by_steps(world: Any) -> None:
    cache = read(world.model, [5, 6])
    layer = cache.cache.layers[0]
    places = set()
    for _ in range(ROOM + 10):
        forward(world.model, cache, torch.tensor([[9]]), torch.tensor([[1]]))
        places.add(layer.keys.data_ptr())
    assert len(places) == 2
