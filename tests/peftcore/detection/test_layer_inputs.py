"""Whether a layer sees rows or tokens first: by `batch_first`, by transformers' convention, or not at all."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LongformerConfig,
    LongformerModel,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetModel,
)

from peftcore import LoraConfig, get_peft_model
from peftcore.detection.layer_inputs import rows_come_first, shared_input_groups
from peftcore.errors import RoutingError


def lora(*targets: str) -> LoraConfig:
    return LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)


def adapted(model: nn.Module, *targets: str) -> Any:
    model = get_peft_model(model.double(), lora(*targets), "a")
    model.add_adapter("b", lora(*targets))
    return model.double().eval()


def encoder(batch_first: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(6, 2, 12, batch_first=batch_first), 1, enable_nested_tensor=False
    )


class Unknown(nn.Module):
    """Says nothing of its axes; tokens come first in the middle."""

    def __init__(self, swaps: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.swaps, self.linear = swaps, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.transpose(0, 1)).transpose(0, 1) if self.swaps else self.linear(x)


def rows_as_alone(model: Any, x: Tensor, names: list[Any]) -> None:
    mixed = model(x, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], model(x[row : row + 1], adapter_names=name)[0], atol=1e-10, rtol=0)


def test_what_is_known() -> None:
    sizes: dict[str, Any] = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
    bert = BertModel(BertConfig(num_hidden_layers=1, **sizes))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    xlnet = XLNetModel(XLNetConfig(vocab_size=20, d_model=16, n_layer=1, n_head=2, d_inner=16))
    longformer = LongformerModel(LongformerConfig(num_hidden_layers=1, attention_window=4, **sizes))
    for model, path, expected in (
        (llama, "model.layers.0.self_attn.q_proj", True),
        (get_peft_model(llama, lora("q_proj")), "model.layers.0.self_attn.q_proj", True),
        (bert, "encoder.layer.0.attention.self.query", True),
        (gpt2, "transformer.h.0.attn.c_attn", True),
        (t5, "decoder.block.0.layer.1.EncDecAttention.k", True),
        (xlnet, "layer.0.ff.layer_1", None),
        (longformer, "encoder.layer.0.attention.self.query", None),
        (encoder(True), "layers.0.linear1", True),
        (encoder(False), "layers.0.linear1", False),
        (nn.Sequential(encoder(False)), "0.layers.0.self_attn.out_proj", False),
        (Unknown(False), "linear", None),
    ):
        assert rows_come_first(model, path) is expected, (type(model).__name__, path)


@pytest.mark.parametrize("gradients", [False, True])
def test_as_many_tokens_as_rows(gradients: bool) -> None:
    x, names = torch.randn(3, 3, 6, dtype=torch.float64), ["a", "b", "__base__"]
    with torch.set_grad_enabled(gradients):
        rows_as_alone(adapted(encoder(True), "linear1", "linear2"), x, names)
        for model in (adapted(encoder(False), "linear1"), adapted(Unknown(True), "linear")):
            with pytest.raises(RoutingError, match=r"sees \(3, 3\) and the batch has 3 rows.*batch_first=True"):
                model(x, adapter_names=names)
            model(x, adapter_names=["b", "b", "b"])  # all alike


def test_a_module_that_says_nothing_is_known_by_an_attribute_or_by_another_batch() -> None:
    x, names = torch.randn(3, 3, 6, dtype=torch.float64), ["a", "b", "__base__"]
    said = adapted(Unknown(False), "linear")
    said.batch_first = True
    rows_as_alone(said, x, names)
    seen = adapted(Unknown(False), "linear")
    seen(torch.randn(3, 5, 6, dtype=torch.float64), adapter_names=names)
    rows_as_alone(seen, x, names)
    with pytest.raises(RoutingError, match="sees 5 rows and the batch has 3"):
        adapted(Unknown(True), "linear")(torch.randn(3, 5, 6, dtype=torch.float64), adapter_names=names)


def test_models_of_transformers_with_as_many_tokens_as_rows() -> None:
    sizes: dict[str, Any] = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    model = adapted(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)), "q_proj", "up_proj", "embed_tokens")
    tokens, names = torch.arange(9).view(3, 3), ["a", "b", "__base__"]
    mixed = model(tokens, adapter_names=names).logits
    for row, name in enumerate(names):
        alone = model(tokens[row : row + 1], adapter_names=name).logits[0]
        torch.testing.assert_close(mixed[row], alone, atol=1e-10, rtol=0)
    torch.manual_seed(0)
    xlnet = adapted(XLNetModel(XLNetConfig(vocab_size=20, d_model=16, n_layer=1, n_head=2, d_inner=16)), "layer_1")
    with pytest.raises(RoutingError, match="first or the second axis"):
        xlnet(tokens, adapter_names=names)


def test_siblings_that_read_one_input() -> None:
    sizes = {"q_proj": (16, 16), "k_proj": (16, 8), "v_proj": (16, 8), "o_proj": (16, 16)}
    attention = nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})
    assert shared_input_groups(attention) == [["q_proj", "k_proj", "v_proj"]]
    cross = nn.ModuleDict({"q": nn.Linear(16, 16), "k": nn.Linear(8, 16), "v": nn.Linear(8, 16)})
    assert shared_input_groups(cross) == [["k", "v"]]
    for path in ("decoder.block.0.layer.1.EncDecAttention", "decoder.layers.0.encoder_attn", "0.crossattention.self"):
        assert shared_input_groups(attention, path) == [["k_proj", "v_proj"]]
    for path in ("encoder.layers.0.self_attn", "decoder.block.0.layer.0.SelfAttention"):
        assert shared_input_groups(attention, path) == [["q_proj", "k_proj", "v_proj"]]
    mlp = nn.ModuleDict({"gate": nn.Linear(16, 48), "up": nn.Linear(16, 48), "down": nn.Linear(48, 16)})
    assert shared_input_groups(mlp) == [["gate", "up"]]
