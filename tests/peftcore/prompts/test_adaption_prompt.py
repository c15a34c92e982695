"""Adaption prompt (LLaMA-Adapter): gated attention to learned tokens in the top layers."""

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from prompt_models import DECODER, attach, batch, both_ways, build, call
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, Qwen2Config
from transformers import Qwen2ForCausalLM as Qwen2

from peftcore import LoraConfig, get_peft_model
from peftcore.errors import ConfigError, TargetError
from peftcore.prompts.adaption_prompt import AdaptionPromptConfig

OPTIONS: dict[str, Any] = {"adapter_len": 3, "adapter_layers": 2, "task_type": "CAUSAL_LM"}


@pytest.mark.filterwarnings("ignore")  # the oracle's own
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_parity(family: str, layers: int, tmp_path: Path) -> None:
    options = {**OPTIONS, "adapter_layers": layers}
    both_ways(family, peft.AdaptionPromptConfig(**options), AdaptionPromptConfig(**options), tmp_path, spread=1.0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_starts_at_the_base(family: str) -> None:
    base = call(family, build(family))
    model = get_peft_model(build(family), AdaptionPromptConfig(**OPTIONS))
    assert all(prompt.std() > 0.5 for prompt in model.prompt_encoder["default"].prompts)
    torch.testing.assert_close(call(family, model), base, rtol=0, atol=0)


def test_the_top_layer_adds_gated_attention() -> None:
    model = attach("llama", AdaptionPromptConfig(**{**OPTIONS, "adapter_layers": 1}), 1.0).double()
    learner, attention = model.prompt_encoder["default"], model.model.layers[1].self_attn
    seen: dict[str, Any] = {}
    attention.register_forward_hook(lambda _m, _a, kw, out: seen.update(kw, out=out[0]), with_kwargs=True)
    with torch.no_grad():
        model(batch(1))
        ours = seen["out"][0]
        with model.disable_adapter():
            model(batch(1))
        q = attention.q_proj(seen["hidden_states"][0])
        cos, sin = (x[0] for x in seen["position_embeddings"])
        k, v = attention.k_proj(learner.prompts[0][0]), attention.v_proj(learner.prompts[0][0])
        heads = []
        for head in range(4):
            own, shared = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
            a, b = q[:, own].chunk(2, -1)
            rotated = q[:, own] * cos + torch.cat([-b, a], -1) * sin
            heads.append((rotated @ k[:, shared].T / 8**0.5).softmax(-1) @ v[:, shared])
        added = learner.gates[0] * attention.o_proj(torch.cat(heads, -1))
    torch.testing.assert_close(ours, seen["out"][0] + added, rtol=0, atol=1e-6)  # the softmax is float32


def test_a_bias_after_the_heads_is_added_once() -> None:
    """PEFT sends the prompt's part through the whole output layer, bias included, and leaves the base at gate zero."""
    config = LlamaConfig(**DECODER, attention_bias=True)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.o_proj.bias)
    base = model(batch()).logits
    model = get_peft_model(model, AdaptionPromptConfig(**OPTIONS))
    torch.testing.assert_close(model(batch()).logits, base, rtol=0, atol=1e-5)


def test_works_by_form_for_other_families() -> None:
    torch.manual_seed(0)
    model = get_peft_model(Qwen2(Qwen2Config(**DECODER)).eval(), AdaptionPromptConfig(**OPTIONS))
    base = model(batch()).logits
    for gate in model.prompt_encoder["default"].gates:
        gate.data.fill_(1.0)
    assert (model(batch()).logits - base).abs().max() > 1e-3


def test_only_prompts_and_gates_train_and_all_get_gradients() -> None:
    model = attach("llama", AdaptionPromptConfig(**OPTIONS), 1.0).train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4 and all(name.startswith("prompt_encoder.") for name in trained)
    model(batch(), labels=batch()).loss.backward()
    assert all(p.grad.norm() > 0 for p in model.parameters() if p.requires_grad)


def test_two_of_them_and_lora_act_together() -> None:
    model = attach("llama", AdaptionPromptConfig(**OPTIONS), 1.0)
    one = call("llama", model)
    model.add_adapter("two", AdaptionPromptConfig(**OPTIONS))
    for gate in model.prompt_encoder["two"].gates:
        gate.data.fill_(0.7)
    model.add_adapter("lora", LoraConfig(init_lora_weights=False))
    model.set_adapter(["default", "two"])
    both = call("llama", model)
    assert (both - one).abs().max() > 1e-3
    model.set_adapter(["default", "two", "lora"])
    assert (call("llama", model) - both).abs().max() > 1e-3
    model.set_adapter("default")
    torch.testing.assert_close(call("llama", model), one, rtol=0, atol=0)
    model.set_adapter([])
    model.delete_adapter("default")
    base = call("llama", build("llama"))
    torch.testing.assert_close(call("llama", model), base, rtol=0, atol=0)
    assert all(not module._forward_hooks for module in model.unload().modules())


def test_copies_have_hooks_of_their_own() -> None:
    model = attach("llama", AdaptionPromptConfig(**OPTIONS), 1.0)
    before = call("llama", model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(call("llama", copied), before, rtol=0, atol=0)
        for gate in copied.prompt_encoder["default"].gates:
            gate.data.zero_()
        torch.testing.assert_close(call("llama", copied), call("llama", build("llama")), rtol=0, atol=0)
        torch.testing.assert_close(call("llama", model), before, rtol=0, atol=0)


def test_checkpointed_layers_give_the_same_gradients() -> None:
    model = attach("llama", AdaptionPromptConfig(**OPTIONS), 1.0).train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(batch(), labels=batch()).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="adapter_layers=5, but the model has 2"):
        get_peft_model(build("llama"), AdaptionPromptConfig(adapter_len=2, adapter_layers=5))
    with pytest.raises(ConfigError, match="adapter_len must be a positive integer"):
        get_peft_model(build("llama"), AdaptionPromptConfig(adapter_layers=2))
    bert = BertForSequenceClassification(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(TargetError, match="no attention module that an adaption prompt supports"):
        get_peft_model(bert, AdaptionPromptConfig(adapter_len=2, adapter_layers=1))
    with pytest.raises(TargetError, match="named 'attn'"):
        get_peft_model(build("llama"), AdaptionPromptConfig(adapter_len=2, adapter_layers=1, target_modules="attn"))
