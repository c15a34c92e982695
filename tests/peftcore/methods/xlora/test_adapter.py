"""X-LoRA at a layer: each LoRA adds its change, times its weight for the token and layer."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from method_example import randomise
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification
from xlora_models import config, llama, lora_alone, mixed, mixture, tokens

from peftcore import ConfigError, LoraConfig, MergeError, get_peft_model
from peftcore.methods.xlora import XLoraConfig


def test_a_weight_of_one_is_that_lora_and_weights_of_zero_are_the_base(loras: dict[str, str]) -> None:
    model = mixed(loras, enable_softmax=False)
    last: Any = mixture(model).internal_xlora_classifier.layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
        torch.testing.assert_close(model(tokens()).logits, llama()(tokens()).logits)
        for n in range(3):
            last.bias.zero_()[n] = 1.0
            expected = lora_alone(loras, n)(tokens()).logits
            torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-5, atol=1e-5)


def test_each_token_and_layer_has_its_own_weights(loras: dict[str, str]) -> None:
    """One layer in float64 against the sum that the paper writes."""
    model = mixed(loras, layerwise_scalings=True).double()
    layer = model.model.layers[1].self_attn.q_proj
    seen: dict[str, Tensor] = {}
    layer.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], y=output))
    model(tokens())
    scalings = mixture(model).scalings
    assert scalings is not None and scalings.shape == (2, 7, 7, 3)  # embedding, and q, v, down in two blocks
    torch.testing.assert_close(scalings.sum(-1), torch.ones(2, 7, 7, dtype=torch.float64))
    assert scalings.std(0).min() > 0 and scalings.std(1).min() > 0 and scalings.std(2).min() > 0
    own = scalings[:, :, mixture(model).numbers["model.layers.1.self_attn.q_proj"]]
    expected = layer.base_layer(seen["x"])
    for n in (0, 1):
        expert = lora_alone(loras, n).double().model.layers[1].self_attn.q_proj.adapters["default"]
        expected = expected + own[..., n, None] * (seen["x"] @ expert.delta_weight().T)
    torch.testing.assert_close(seen["y"], expected, rtol=1e-10, atol=1e-10)


def test_gradient_checkpointing_gives_the_same_gradients(loras: dict[str, str]) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = mixed(loras).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append(mixture(model).internal_xlora_classifier.layers[0].weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_generate_equals_repeated_forwards(loras: dict[str, str]) -> None:
    model = mixed(loras)
    row = tokens()[:1]
    found = model.generate(row, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    for _ in range(5):
        row = torch.cat([row, model(row).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, row)
    cache = llama()(tokens(), use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="use_cache=False"):
        model(tokens(), past_key_values=cache)


def test_disabled_deleted_and_unloaded_is_the_base(loras: dict[str, str]) -> None:
    model = mixed(loras)
    base = llama()(tokens()).logits
    assert (model(tokens()).logits - base).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(model(tokens()).logits, base)
    with pytest.raises(MergeError, match=r"XLORA.s weights depend on the token"):
        model.merge_adapter()
    assert torch.equal(copy.deepcopy(model).unload()(tokens()).logits, base)


def test_half_precision(loras: dict[str, str]) -> None:
    model = get_peft_model(llama().bfloat16(), config(loras, xlora_depth=2, xlora_size=16))
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert model(tokens()).logits.dtype == torch.bfloat16


def test_encoders_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    bert: Any = BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=2, initializer_range=0.2)).eval()
    donor = get_peft_model(bert, LoraConfig(r=2, target_modules=["query", "value"]))
    randomise(donor, 0.3)
    donor.save_pretrained(tmp_path)
    bert = donor.unload()
    base = bert(tokens()).logits.detach()
    model = get_peft_model(bert, XLoraConfig(hidden_size=32, adapters={"one": str(tmp_path)}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (model(tokens()).logits - base).abs().max() > 1e-4
