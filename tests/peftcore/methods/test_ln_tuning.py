"""LN tuning: which norms it finds, and that it computes with its own weight as each norm does with the base's."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from layer_parity import agrees_with_peft
from method_example import Example, randomise
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2Model,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5EncoderModel,
)
from transformers.pytorch_utils import Conv1D

from peftcore import LoraConfig, PeftModel, TargetError, get_peft_model, set_peft_model_state_dict
from peftcore.methods.ln_tuning import LNTuningConfig

DECODER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 32,
}

EXAMPLE = Example(
    LNTuningConfig,
    theirs="LNTuningConfig",
    parity={"plain": {}},
    families=("gpt2", "llama", "bert", "t5", "qwen2"),
    targets={
        "gpt2": None,
        "llama": None,
        "bert": ["LayerNorm"],
        "t5": None,
        "qwen2": ["input_layernorm", "norm"],
    },
)


def tuned(model: nn.Module, targets: list[str] | None = None) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(model.double(), LNTuningConfig(target_modules=targets))
    randomise(model, 0.3)
    return model


def test_default_targets_are_the_norms_on_the_stream() -> None:
    wanted = {
        LlamaModel(LlamaConfig(**DECODER)): {"input_layernorm", "post_attention_layernorm", "norm"},
        GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32)): {"ln_1", "ln_2", "ln_f"},
        BertModel(BertConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)): {
            "output.LayerNorm"  # the one of the embeddings stays as it is
        },
    }
    for model, names in wanted.items():
        assert get_peft_model(model, LNTuningConfig()).peft_config["default"].target_modules == names


def test_what_a_norm_is() -> None:
    class MyNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    class ConditionedNorm(MyNorm):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(4, 4)

    net = nn.ModuleDict(
        {
            "mine": MyNorm(),
            "group": nn.GroupNorm(2, 4),
            "rms": nn.RMSNorm(4),
            "conditioned": ConditionedNorm(),
            "without weight": nn.LayerNorm(4, elementwise_affine=False),
            "statistics": nn.SyncBatchNorm(4),
            "linear": nn.Linear(4, 4),
        }
    )
    net = get_peft_model(net, LNTuningConfig())
    assert net.peft_config["default"].target_modules == {"mine", "group", "rms"}


@pytest.mark.parametrize("kind", ["group", "rms", "no bias"])
def test_other_norms_merge_to_what_they_computed(kind: str) -> None:
    layer = {"group": nn.GroupNorm(2, 4), "rms": nn.RMSNorm(4), "no bias": nn.LayerNorm(4, bias=False)}[kind]
    x = torch.randn(3, 4, 4, dtype=torch.float64)
    net = tuned(nn.Sequential(layer), ["0"])
    own = net[0].adapters["default"]
    adapted = net(x)
    reference = type(layer)(*((2, 4) if kind == "group" else (4,)), **({"bias": False} if kind == "no bias" else {}))
    reference.double().load_state_dict({name.removeprefix("ln_tuning_"): p for name, p in own.named_parameters()})
    torch.testing.assert_close(adapted, reference(x), rtol=1e-12, atol=1e-12)
    net.merge_adapter()
    torch.testing.assert_close(net(x), adapted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("model", ["gemma2", "t5"])
def test_what_a_norm_does_with_its_weight_stays_its_own(model: str) -> None:
    """Gemma multiplies by 1 + w, T5 computes in float32: changing the base's weights is the reference."""
    torch.manual_seed(0)
    if model == "gemma2":
        net: Any = Gemma2Model(Gemma2Config(**DECODER)).eval()
    else:
        net = T5EncoderModel(T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=32)).eval()
    net = get_peft_model(net, LNTuningConfig())
    randomise(net, 0.3)
    tokens = torch.randint(0, 32, (2, 5))
    adapted = net(tokens).last_hidden_state
    weights = {
        path: host.adapters["default"].ln_tuning_weight.detach() for path, host in net._adapter_set.layers.items()
    }
    plain = net.unload()
    before = plain(tokens).last_hidden_state
    for path, weight in weights.items():
        plain.get_submodule(path).weight.data.copy_(weight)
    assert (adapted - before).abs().max() > 1e-2
    torch.testing.assert_close(adapted, plain(tokens).last_hidden_state, rtol=1e-6, atol=1e-6)


def test_it_starts_from_the_base_also_while_that_is_merged() -> None:
    net = tuned(nn.Sequential(nn.LayerNorm(4)), ["0"])
    base = net[0].base_layer.weight.clone()
    net.merge_adapter()
    net.add_adapter("other", LNTuningConfig(target_modules=["0"]))
    other = net[0].adapters["other"]
    assert torch.equal(other.ln_tuning_weight, base) and torch.equal(other.ln_tuning_bias, torch.zeros_like(base))


def test_half_precision_starts_bit_for_bit_as_the_base() -> None:
    for norm in (nn.LayerNorm(64), nn.RMSNorm(64)):
        net: Any = nn.Sequential(norm).bfloat16()
        nn.init.normal_(net[0].weight)
        x = torch.randn(5, 64, dtype=torch.bfloat16)
        before = net(x)
        assert torch.equal(get_peft_model(net, LNTuningConfig(target_modules=["0"]))(x), before)


def test_default_targets_beside_another_adapter(tmp_path: Path) -> None:
    model = get_peft_model(LlamaModel(LlamaConfig(**DECODER)), LNTuningConfig())
    model.add_adapter("again", LNTuningConfig())
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["q_proj"]))
    assert model.peft_config["again"].target_modules == model.peft_config["default"].target_modules
    model.save_pretrained(tmp_path, selected_adapters=["again"])
    assert isinstance(PeftModel.from_pretrained(LlamaModel(LlamaConfig(**DECODER)), tmp_path / "again"), PeftModel)


@pytest.mark.parametrize(
    "layer, x",
    [
        (nn.Linear(4, 6), torch.randn(3, 4)),
        (nn.Embedding(5, 4), torch.tensor([[0, 3], [1, 1]])),
        (nn.Conv2d(2, 4, 2), torch.randn(2, 2, 4, 4)),
    ],
    ids=["Linear", "Embedding", "Conv2d"],
)
def test_other_layers_that_are_named_train_whole_as_in_peft(layer: nn.Module, x: torch.Tensor) -> None:
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), peft.LNTuningConfig(target_modules=["0"]))
    randomise(theirs, 0.3)
    ours = get_peft_model(nn.Sequential(layer), LNTuningConfig(target_modules=["0"]))
    set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    torch.testing.assert_close(ours(x), theirs(x))
    ours.merge_adapter()
    torch.testing.assert_close(ours(x), theirs(x))


def test_only_norms_are_default_targets() -> None:
    with pytest.raises(TargetError, match="LN_TUNING in Sequential"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), LNTuningConfig())


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Linear(6, 4, bias=False), Conv1D(4, 6)], ids=str)
def test_a_linear_layer_means_what_it_means_in_peft(layer: nn.Module, tmp_path: Path) -> None:
    agrees_with_peft(layer, torch.randn(3, 6), "LNTuningConfig", LNTuningConfig, {}, tmp_path)
