"""What the LoRA paper says, and what LoRA must refuse."""

import copy
import json
from typing import Any

import pytest
import torch
from dropout_facts import assert_dropout_keeps_the_mean
from method_example import Example
from torch import nn

from peftcore import ConfigError, LoraConfig, MergeError, get_peft_model
from peftcore.injection.adapter_set import adapter_set

EXAMPLE = Example(
    LoraConfig,
    options={"r": 4, "lora_alpha": 12},
    theirs="LoraConfig",
    parity={
        "plain": {"r": 4},
        "rslora": {"r": 4, "lora_alpha": 16, "use_rslora": True},
        "dora": {"r": 4, "lora_alpha": 6, "use_dora": True},
        "lora_bias": {"r": 4, "lora_alpha": 6, "lora_bias": True},
        "pissa": {"r": 4, "lora_alpha": 6, "init_lora_weights": "pissa"},
        "olora": {"r": 4, "lora_alpha": 6, "init_lora_weights": "olora"},
        "pissa and dora": {"r": 4, "lora_alpha": 6, "init_lora_weights": "pissa", "use_dora": True},
        "orthogonal": {"r": 4, "init_lora_weights": "orthogonal"},
    },
    families=("gpt2", "llama", "bert", "t5", "vit"),
    only_ours={("olora", "gpt2"): "it decomposes the weight of a Conv1D as that of a Linear, so the shapes do not fit"},
)


def lora_at(net: nn.Module, path: str = "0"):
    return adapter_set(net).adapters("default")[path]


def test_the_papers_formula() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5)).double()
    weight, bias = net[0].weight.clone(), net[0].bias.clone()
    net = get_peft_model(net, LoraConfig(r=3, lora_alpha=12, target_modules=["0"], init_lora_weights=False))
    adapter, x = lora_at(net), torch.randn(4, 6, dtype=torch.float64)
    expected = x @ (weight + 12 / 3 * adapter.lora_B_weight @ adapter.lora_A_weight).T + bias
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)


def test_patterns_match_by_segment_and_the_first_wins() -> None:
    config = LoraConfig(r=8, lora_alpha=8, rank_pattern={"q": 2, "block.q": 3}, alpha_pattern={r"h\.\d+\.k": 5.0})
    assert config.at("block.q") == (2, 8)
    assert config.at("block.seq") == (8, 8)
    assert config.at("h.11.k") == (8, 5.0)


def test_dropout_acts_while_training_only_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 4, bias=False)).double()
    net = get_peft_model(net, LoraConfig(r=4, lora_dropout=0.4, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(1, 64, dtype=torch.float64)
    assert_dropout_keeps_the_mean(net, x)


def test_gradients_match_autograd_of_the_dense_form() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5)).double()
    net = get_peft_model(net, LoraConfig(r=3, lora_alpha=7, target_modules=["0"], init_lora_weights=False))
    adapter = lora_at(net)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *_: net(x), (x, adapter.lora_A_weight, adapter.lora_B_weight))


def test_scaled_embeddings_scale_the_adapter_too() -> None:
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, input):
            return super().forward(input) * self.embed_scale

    net = nn.Sequential(Scaled(20, 8)).double()
    net = get_peft_model(net, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    x = torch.randint(0, 20, (3, 5))
    adapted = net(x)
    net.merge_adapter()
    torch.testing.assert_close(net(x), adapted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_token_ids_are_never_cast(dtype: torch.dtype, autocast: bool) -> None:
    """3001 is no number of bfloat16's, whose neighbours there are 2992 and 3008."""
    net = nn.Sequential(nn.Embedding(3002, 4)).to(dtype)
    net = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = net(torch.tensor([3001]))
    merged = lora_at(net).merged_weight(net[0].base_layer.weight.float().T).T
    torch.testing.assert_close(out[0].float(), merged[3001], rtol=1e-2, atol=1e-2)
    assert (merged[3001] - merged[2992]).abs().max() > 0.1


@pytest.mark.parametrize("padding", ["same", 2])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_a_convolution_keeps_its_padding_dilation_and_stride(mode: str, padding: Any) -> None:
    torch.manual_seed(0)
    stride = 1 if padding == "same" else 2
    layer = nn.Conv2d(4, 6, 3, padding=padding, dilation=2, stride=stride, padding_mode=mode).double()
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    net = get_peft_model(nn.Sequential(layer), LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
    adapted = net(x)
    whole = copy.deepcopy(layer)
    with torch.no_grad():
        whole.weight.add_(lora_at(net).delta_weight())
    torch.testing.assert_close(adapted, whole(x), rtol=1e-12, atol=1e-12)


def test_grouped_convolution_trains_but_does_not_merge() -> None:
    net = get_peft_model(nn.Sequential(nn.Conv2d(6, 8, 3, groups=2)), LoraConfig(r=4, target_modules=["0"]))
    with pytest.raises(MergeError, match="groups"):
        net.merge_adapter()
    with pytest.raises(ConfigError, match="multiple of its 2 groups, got 3"):
        get_peft_model(nn.Sequential(nn.Conv2d(6, 8, 3, groups=2)), LoraConfig(r=3, target_modules=["0"]))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r": 0}, "r must be a positive integer; got 0"),
        ({"lora_dropout": 1.0}, "below 1; got 1.0"),
        ({"bias": "some"}, "one of 'none', 'all', 'lora_only'; got 'some'"),
        ({"init_lora_weights": "pisa"}, "pissa.*got 'pisa'"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "even ranks"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 3}}, "4 or 8; got 3"),
        ({"use_dora": True, "lora_bias": True}, "exclude each other"),
        ({"use_dora": True, "alora_invocation_tokens": [1]}, "exclude each other"),
        ({"lora_dropout": 0.1, "target_parameters": ["w"]}, "lora_dropout=0"),
        ({"alora_invocation_tokens": []}, "empty"),
        ({"lora_aplha": 3}, "did you mean 'lora_alpha'"),
        ({"task_type": "CHAT"}, "CAUSAL_LM"),
        ({"layers_pattern": "h"}, "needs layers_to_transform"),
    ],
)
def test_impossible_options(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**options)


def test_mathematics_that_is_not_here_is_refused_not_ignored() -> None:
    with pytest.raises(ConfigError, match=r"megatron_config=\{'size': 2\} is not supported"):
        LoraConfig.from_dict({"peft_type": "LORA", "megatron_config": {"size": 2}}, from_disk=True)
    assert LoraConfig.from_dict({"peft_type": "LORA", "use_dora": False, "eva_config": None}, from_disk=True)
    with pytest.warns(UserWarning, match="from_the_future"):
        config = LoraConfig.from_dict({"peft_type": "LORA", "from_the_future": 3}, from_disk=True)
    assert json.loads(config.to_json())["from_the_future"] == 3 and "from_the_future" not in config.to_dict()
