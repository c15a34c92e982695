"""Rows joined in one forward, of architectures that tell positions and windows in different ways."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from peftcore import LoraConfig, get_peft_model
from peftcore.composition import BASE, Average, Only, Split
from peftcore.errors import ConfigError
from peftcore.injection import activation
from peftcore.serving.forward import RoutedForward
from peftcore.serving.kv_cache import KVCache

LLAMA_LIKE: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "head_dim": 16},
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE,
    "mistral": {**LLAMA_LIKE, "sliding_window": 6},
    "gemma3_text": {**LLAMA_LIKE, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3": LLAMA_LIKE,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "gpt_neox": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
}

IN_FLOAT32 = ("bloom",)
"""Its softmax is in float32 always, where the mask of float64 is infinite."""


def made(kind: str) -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](vocab_size=80, pad_token_id=0, **ARCHITECTURES[kind])
    model = AutoModelForCausalLM.from_config(config).eval()
    model = model if kind in IN_FLOAT32 else model.double()
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        one = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, inference_mode=True)
        if name == "a":
            model = get_peft_model(model, one, name)
        else:
            model.add_adapter(name, one)
    return model


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_rows_that_join_later_compute_what_they_compute_alone(kind: str) -> None:
    model = made(kind)
    forward = RoutedForward(model)
    routes = [Only("a"), BASE, Only("b"), Average("a", "b"), Split(a=4, b=...), Only("a")]
    texts = [torch.randint(1, 80, (length,)).tolist() for length in (3, 11, 1, 7, 9, 5)]
    cache, rows = KVCache.empty(0), []
    for turn in range(14):
        if turn in (0, 2, 4):  # two more
            fresh = list(range(len(rows), len(rows) + 2))
            longest = max(len(texts[row]) for row in fresh)
            tokens = torch.tensor([[0] * (longest - len(texts[row])) + texts[row] for row in fresh])
            mask = torch.tensor([[0] * (longest - len(texts[row])) + [1] * len(texts[row]) for row in fresh])
            step = forward.step(KVCache.empty(2), tokens, mask, [routes[row] for row in fresh])
            assert_alone(model, step.logits, [texts[row] for row in fresh], [routes[row] for row in fresh])
            cache, rows = KVCache.join([cache, step.cache]), rows + fresh
        if turn == 9:  # the longest leave
            cache, rows = cache.select([0, 2, 5]), [rows[0], rows[2], rows[5]]
        tokens = torch.randint(1, 80, (len(rows), 1))
        for row, token in zip(rows, tokens, strict=True):
            texts[row].append(int(token))
        step = forward.step(cache, tokens, torch.ones_like(tokens), [routes[row] for row in rows])
        assert not step.failures
        cache = step.cache
        assert_alone(model, step.logits, [texts[row] for row in rows], [routes[row] for row in rows])


@torch.no_grad()
def assert_alone(model: Any, logits: torch.Tensor, texts: list[list[int]], routes: list[Any]) -> None:
    for found, text, route in zip(logits, texts, routes, strict=True):
        with activation.routed(model, route):
            expected = model(torch.tensor([text]), use_cache=False).logits[0, -1]
        tolerance = 1e-5 if found.dtype == torch.float32 else 1e-9
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("prompts", [1, 3])
@torch.no_grad()
def test_rows_without_padding_are_given_a_mask_so_that_the_heads_are_grouped(
    prompts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's own grouping (`enable_gqa`) is slow on CPUs, and transformers asks for it if there is no mask."""
    model = made("llama")
    tokens = torch.randint(1, 80, (prompts, 7))
    with activation.routed(model, BASE):
        expected = model(tokens, use_cache=False).logits[:, -1]
    forward = RoutedForward(model)
    attention, asked = torch.nn.functional.scaled_dot_product_attention, []
    spy = lambda *given, **options: asked.append("enable_gqa" in options) or attention(*given, **options)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    step = forward.step(KVCache.empty(prompts), tokens[:, :6], torch.ones_like(tokens[:, :6]), [BASE] * prompts)
    asked.clear()
    step = forward.step(step.cache, tokens[:, 6:], torch.ones_like(tokens[:, 6:]), [BASE] * prompts)
    assert asked == [False] * model.config.num_hidden_layers
    torch.testing.assert_close(step.logits, expected, atol=1e-9, rtol=1e-9)


def test_a_model_that_keeps_other_states_is_refused() -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 80}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["mamba"](**small))
    with pytest.raises(ConfigError, match="MambaForCausalLM keeps"):
        RoutedForward(model)
