"""A prefix of keys and values before those of each attention, asked of prefix tuning."""

from typing import Any

import pytest
import torch
from method_example import randomise
from prompt_models import DECODER, ENCODER, FAMILIES, attach, batch, build, call
from tiny_models import tiny
from torch import Tensor, nn
from transformers import (
    BertModel,
    DynamicCache,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from peftcore import get_peft_model
from peftcore.errors import ConfigError, TrainingError
from peftcore.prompts.cache import kv_shapes
from peftcore.prompts.prefix_tuning import PrefixTuningConfig

CAUSAL: dict[str, Any] = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}


def with_prefix_in_each_layer(model: Any, states: Tensor) -> Any:
    """BERT with [K_P; K] and [V_P; V] in its attentions: hooks on the projections, and a mask as wide as the keys."""
    for number, layer in enumerate(model.encoder.layer):
        for name, row in (("key", 2 * number), ("value", 2 * number + 1)):
            prefix = states[row].transpose(0, 1).flatten(1)  # (k, n, w) -> (n, k·w)

            def hook(_m: nn.Module, _i: Any, out: Tensor, prefix: Tensor = prefix) -> Tensor:
                return torch.cat([prefix.expand(len(out), -1, -1), out], dim=1)

            getattr(layer.attention.self, name).register_forward_hook(hook)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("masked", [False, True])
def test_encoders_attend_to_the_prefix(attention: str, masked: bool) -> None:
    model = attach("bert-features", PrefixTuningConfig(num_virtual_tokens=3))
    model.set_attn_implementation(attention)
    mask = torch.ones(2, 6, dtype=torch.long)
    if masked:
        mask[1, 4:] = 0
    given = {"attention_mask": mask} if masked else {}
    # written by hand: keys and values are doubled up per head, so views of (rows, -1, heads, width) need whole rows
    plain = BertModel(ENCODER).eval()
    plain.load_state_dict(build("bert-features").state_dict())
    plain.set_attn_implementation("eager")
    with_prefix_in_each_layer(plain, model.prompt_encoder["default"].key_values())
    wide = torch.cat([torch.ones(2, 3), mask.float()], 1)[:, None, None].expand(2, 1, 6, 9)
    for layer in plain.encoder.layer:
        split_for_nine_keys(layer.attention.self)
    with torch.no_grad():
        positions = torch.arange(3, 9)[None]  # the text counts on after the prefix
        expected = plain(batch(), attention_mask=(1 - wide) * -1e9, position_ids=positions).last_hidden_state
    out = call("bert-features", model, **given)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def split_for_nine_keys(attention: Any) -> None:
    """Let BERT's attention take more keys than queries, as its own code splits both by the query's length."""

    def forward(hidden_states: Tensor, attention_mask: Tensor, **_more: Any) -> tuple[Tensor, None]:
        heads, width = attention.num_attention_heads, attention.attention_head_size
        q, k, v = (
            layer(hidden_states).unflatten(-1, (heads, width)).transpose(1, 2)
            for layer in (attention.query, attention.key, attention.value)
        )
        weights = (q @ k.transpose(2, 3) / width**0.5 + attention_mask).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2), None

    attention.forward = forward


@pytest.mark.parametrize("family", ["bert-cls", "bert-tokens", "bert-qa", "llama-cls"])
def test_every_task_takes_it(family: str) -> None:
    config = PrefixTuningConfig(num_virtual_tokens=3, task_type=FAMILIES[family][1])
    out = call(family, model := attach(family, config), attention_mask=torch.ones(2, 6))
    with model.disable_adapter():
        assert out.shape == call(family, model).shape
        assert (out - call(family, model)).abs().max() > 1e-3


def test_keys_and_values_reach_the_softmax() -> None:
    """One layer, one head, written out: softmax(q [K_P; K]ᵀ/√w) [V_P; V]."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**DECODER, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1})
    model = get_peft_model(LlamaForCausalLM(config).double().eval(), PrefixTuningConfig(**CAUSAL))
    learner = model.prompt_encoder["default"]
    attention = model.model.layers[0].self_attn
    seen: dict[str, Any] = {}
    attention.register_forward_hook(lambda _m, _a, kw, out: seen.update(kw, out=out[0]), with_kwargs=True)
    with torch.no_grad():
        model(batch(1))
        hidden, (cos, sin) = seen["hidden_states"], seen["position_embeddings"]

        def rotated(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return x * cos + torch.cat([-b, a], -1) * sin

        key, value = learner.vectors.view(3, 2, 32).unbind(1)
        q, k = rotated(attention.q_proj(hidden))[0], rotated(attention.k_proj(hidden))[0]
        k, v = torch.cat([key, k]), torch.cat([value, attention.v_proj(hidden)[0]])
        causal = torch.ones(6, 9, dtype=torch.bool).tril(3)
        weights = (q @ k.T / 32**0.5).masked_fill(~causal, -torch.inf).softmax(-1)
        expected = attention.o_proj(weights @ v)
    torch.testing.assert_close(seen["out"][0], expected, rtol=0, atol=1e-12)


def test_grouped_queries_need_a_narrow_prefix() -> None:
    """Llama here has 4 query heads and 2 key/value heads of width 8, 2 layers: (n, 2·2·2·8)."""
    config = PrefixTuningConfig(**CAUSAL)
    model = get_peft_model(build("llama"), config)
    assert model.prompt_encoder["default"].vectors.shape == (3, 2 * 2 * 2 * 8)
    made = model.peft_config["default"]
    assert (made.token_dim, made.num_attention_heads, made.num_layers) == (16, 2, 2)
    assert config.token_dim is None, "the user's configuration is never changed"


HYBRID = Qwen3NextConfig(
    **{**DECODER, "num_hidden_layers": 4},
    head_dim=8,
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    num_experts=2,
    num_experts_per_tok=1,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
)


def test_layers_without_keys_and_values_are_passed_by() -> None:
    torch.manual_seed(0)
    model = Qwen3NextForCausalLM(HYBRID).eval()
    assert kv_shapes(model) == [None, None, None, (2, 8)]
    model = get_peft_model(model, PrefixTuningConfig(**CAUSAL))
    base = model(batch()).logits
    with torch.no_grad():
        rows = model.prompt_encoder["default"].vectors.view(3, 8, 16)
        rows[:, :6] += 1
        torch.testing.assert_close(model(batch()).logits, base, rtol=0, atol=0)
        rows[:, 6:] += 1
        assert (model(batch()).logits - base).abs().max() > 1e-3


def test_latent_attention_has_no_place_for_a_prefix() -> None:
    with pytest.raises(ConfigError, match="latent attention"):
        get_peft_model(tiny("deepseek_v3"), PrefixTuningConfig(**CAUSAL))


def test_a_call_without_cache_gives_none_back() -> None:
    model = attach("llama", PrefixTuningConfig(**CAUSAL))
    assert model(batch()).cache.get_seq_length() == 9
    assert "cache" not in model(batch(), use_cache=False)
    assert len(model(batch(), use_cache=False, return_dict=False)) == 1
    given = DynamicCache(config=model.config)
    assert model(batch(), cache=given, use_cache=False).logits.shape == (2, 6, 64)


def test_activation_checkpointing_is_refused_both_ways() -> None:
    model = build("llama")
    model.activation_checkpointing_enable()
    with pytest.raises(ConfigError, match="turn checkpointing off"):
        get_peft_model(model, PrefixTuningConfig(**CAUSAL))
    assert "prompt_encoder" not in model._modules
    assert all(p.requires_grad for p in model.parameters()), "nothing was changed"
    model.activation_checkpointing_disable()
    model = get_peft_model(model, PrefixTuningConfig(**CAUSAL)).train()
    model.activation_checkpointing_enable()
    with pytest.raises(TrainingError, match="turn checkpointing off"):
        model(batch())
    model.eval()(batch())


def test_under_autocast_the_prefix_has_the_activations_type() -> None:
    model = attach("llama", PrefixTuningConfig(**CAUSAL))
    full = model(batch()).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = model(batch())
    assert out.cache.layers[0].values.dtype == torch.bfloat16
    assert (out.logits - full).abs().max() < 0.1 * full.abs().max()


def test_gradients_reach_every_layer() -> None:
    model = get_peft_model(build("llama"), PrefixTuningConfig(**CAUSAL)).train()
    model(batch(), labels=batch()).loss.backward()
    gradient = model.prompt_encoder["default"].vectors.grad
    assert (gradient.view(3, 4, 16).norm(dim=-1) > 0).all()


def test_sequence_to_sequence_rows_follow_peft() -> None:
    """PEFT lays 2·L rows out twice and gives each decoder layer every other pair."""
    model = get_peft_model(build("t5"), PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM"))
    learner = model.prompt_encoder["default"]
    assert [learner.indices_of(layer) for layer in range(2)] == [(0, 1), (0, 1)]
    one = PrefixTuningConfig(num_virtual_tokens=3, num_transformer_submodules=1)
    learner = get_peft_model(model.unload(), one).prompt_encoder["default"]
    assert [learner.indices_of(layer) for layer in range(2)] == [(0, 1), (2, 3)]
    randomise(model, 0.3)
    assert call("t5", model).shape == (2, 4, 64)


def test_models_that_cannot_have_one() -> None:
    with pytest.raises(ConfigError, match="accepts no cache"):
        get_peft_model(nn.Linear(2, 2), PrefixTuningConfig(num_virtual_tokens=2))
    assert Gemma3TextConfig().num_key_value_heads  # hybrid caches of sliding windows keep keys and values too


def test_a_prefix_can_be_replaced_and_another_shape_is_refused() -> None:
    model = get_peft_model(build("llama"), PrefixTuningConfig(**CAUSAL))
    learner = model.prompt_encoder["default"]
    values = torch.randn(3, 64)
    learner.load_prompt_embeddings(values)
    assert torch.equal(model.get_prompt_embedding_to_save("default"), values)
    with pytest.raises(ConfigError, match=r"must have the shape \(3, 64\) of this prefix; got \(2, 64\)"):
        learner.load_prompt_embeddings(values[:2])
    model = get_peft_model(build("llama"), PrefixTuningConfig(**CAUSAL, prefix_projection=True))
    with pytest.raises(ConfigError, match="use prefix_projection=False"):
        model.prompt_encoder["default"].load_prompt_embeddings(values)
