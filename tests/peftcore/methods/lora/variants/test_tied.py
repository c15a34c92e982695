"""Tied weights: both sides of a pair are adapted or copied alike."""

from typing import Any

import peft
import pytest
import torch
from lora_nets import TOKENS, adapter, llama, lora
from method_example import randomise
from torch import Tensor, nn

import peftcore
from peftcore import LoraConfig, PeftError, PeftModel, get_peft_model
from peftcore.injection.adapter_set import adapter_set

pytestmark = pytest.mark.filterwarnings("ignore")  # the oracle warns about its own deprecated calls


def test_a_tied_pair_is_adapted_alike(tmp_path: Any) -> None:
    options: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    model = get_peft_model(llama(tie_word_embeddings=True), LoraConfig(**options))
    randomise(model, 0.3)
    layers = adapter_set(model).adapters("default")
    assert set(layers) == {"model.embed_tokens", "lm_head"}
    torch.testing.assert_close(layers["lm_head"].delta_weight(), layers["model.embed_tokens"].delta_weight().T)
    assert sum(p.requires_grad for p in model.parameters()) == 2  # one pair of factors trains
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path)
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits)
    there = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path).eval()
    torch.testing.assert_close(there(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_the_heads_factors_show_those_of_the_embedding() -> None:
    options: dict[str, Any] = {"r": 2, "target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    for library in (peftcore, peft):
        model = library.get_peft_model(llama(tie_word_embeddings=True), library.LoraConfig(**options))
        embedding, head = model.base_model.model.model.embed_tokens, model.base_model.model.lm_head
        assert torch.equal(head.lora_A["default"].weight, embedding.lora_embedding_B["default"].T)
        assert head.lora_B["default"].weight.data_ptr() == embedding.lora_embedding_A["default"].data_ptr()
    model = get_peft_model(llama(tie_word_embeddings=True), LoraConfig(**options))
    with pytest.raises(PeftError, match="assign it there"):
        model.lm_head.lora_A["default"].weight = nn.Parameter(torch.zeros(2, 8))
    assert not list(model.lm_head.lora_A["default"].parameters())


class Tied(nn.Module):
    """Three embeddings and a head with one weight, as in T5."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.shared, self.encoder, self.decoder = (nn.Embedding(9, 6) for _ in range(3))
        self.lm_head = nn.Linear(6, 9, bias=False)
        for layer in (self.encoder, self.decoder, self.lm_head):
            layer.weight = self.shared.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.shared(tokens) + self.encoder(tokens) * self.decoder(tokens))


@pytest.mark.parametrize("target", ["shared", "decoder", "lm_head"])
def test_several_embeddings_of_one_weight_use_one_pair_of_factors(target: str, tmp_path: Any) -> None:
    model = get_peft_model(Tied(), LoraConfig(r=2, target_modules=[target], ensure_weight_tying=True))
    randomise(model, 0.3)
    layers = adapter_set(model).adapters("default")
    assert set(layers) == {"shared", "encoder", "decoder", "lm_head"}
    assert sum(p.requires_grad for p in model.parameters()) == 2
    for name in ("encoder", "decoder"):
        assert torch.equal(layers[name].delta_weight(), layers["shared"].delta_weight())
    assert torch.equal(layers["lm_head"].delta_weight(), layers["shared"].delta_weight().T)
    shown = [model.get_submodule(name).lora_embedding_A["default"] for name in ("shared", "encoder", "decoder")]
    assert len({tensor.data_ptr() for tensor in shown}) == 1
    tokens = torch.arange(5)[None]
    output = model(tokens)
    output.sum().backward()
    model.save_pretrained(tmp_path)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(Tied(), tmp_path, low_cpu_mem_usage=low)
        torch.testing.assert_close(loaded(tokens), output)


def test_a_tied_pair_trained_whole_stays_one_weight() -> None:
    options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    model = get_peft_model(llama(tie_word_embeddings=True), LoraConfig(ensure_weight_tying=True, **options))
    copies = adapter_set(model).copies("default")
    assert copies["lm_head"].weight is copies["model.embed_tokens"].weight
    assert copies["lm_head"].weight is not model.lm_head.base_layer.weight


def test_a_tied_pair_trained_whole_is_saved_as_two_tensors(tmp_path: Any) -> None:
    """safetensors refuses memory that is shared, and views that are not whole: what is saved is cloned first."""
    options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    model = get_peft_model(llama(tie_word_embeddings=True), LoraConfig(ensure_weight_tying=True, **options))
    randomise(model, 0.3)
    layer = adapter(model, "model.layers.0.self_attn.q_proj")
    layer.lora_A_weight.data = layer.lora_A_weight.detach().T.contiguous().T
    assert not layer.lora_A_weight.is_contiguous()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path)
    assert torch.equal(loaded(TOKENS).logits, model.eval()(TOKENS).logits)


def test_raw_parameters_beside_layers_that_may_be_tied() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(2, 6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.up[0]

    net = nn.Sequential(nn.Linear(6, 6), Experts())
    model = lora(net, target_parameters=["1.up"], ensure_weight_tying=True)
    assert set(adapter_set(model).adapters("default")) == {"0", "1.up"}
