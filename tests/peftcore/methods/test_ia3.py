"""What the IA3 paper says: learned vectors scale keys and values, and what enters the feed-forward's last layer."""

from typing import Any

import pytest
import torch
from layer_parity import agrees_with_peft
from method_example import Example, randomise
from torch import nn

from peftcore import ConfigError, PeftModel, get_peft_model
from peftcore.config import PeftConfig
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.ia3 import IA3Config

INPUTS = r".*(mlp\.c_proj|down_proj|intermediate\.dense|wo|fc1)"
EXAMPLE = Example(
    IA3Config,
    layers={
        name: {"feedforward_modules": ["target"]} for name in ("Linear without bias", "Conv1D", "Conv1d", "Conv3d")
    },
    theirs="IA3Config",
    parity={"feed-forward": {"feedforward_modules": INPUTS}, "outputs": {"feedforward_modules": []}},
    families=("gpt2", "llama", "bert", "t5", "vit"),
    targets={"bert": ["query", "intermediate.dense", "classifier"]},
)


def adapted(layer: nn.Module, feedforward: bool) -> tuple[Any, torch.Tensor]:
    """(net, l (i or o,))."""
    torch.manual_seed(0)
    config = IA3Config(target_modules=["0"], feedforward_modules=["0"] if feedforward else [])
    net = get_peft_model(nn.Sequential(layer).double(), config)
    randomise(net, 0.5)
    return net, adapter_set(net).adapters("default")["0"].ia3_l.detach().flatten()  # type: ignore[union-attr]


@pytest.mark.parametrize("feedforward", [False, True])
def test_the_papers_formula(feedforward: bool) -> None:
    layer, x = nn.Linear(6, 5).double(), torch.randn(4, 6, dtype=torch.float64)
    weight, bias = layer.weight.clone(), layer.bias.clone()
    net, scale = adapted(layer, feedforward)
    expected = (x * scale) @ weight.T + bias if feedforward else scale * (x @ weight.T + bias)
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("feedforward", [False, True])
def test_merging_scales_rows_and_bias_or_columns_alone(feedforward: bool) -> None:
    layer = nn.Linear(6, 5).double()
    weight, bias = layer.weight.clone(), layer.bias.clone()
    net, scale = adapted(layer, feedforward)
    merged = net.merge_and_unload()[0]
    torch.testing.assert_close(merged.weight, weight * scale if feedforward else weight * scale[:, None])
    torch.testing.assert_close(merged.bias, bias if feedforward else bias * scale)


def test_a_vector_with_zeros_unmerges_exactly() -> None:
    net, _ = adapted(nn.Linear(6, 5), feedforward=False)
    weight = net[0].weight.clone()
    with torch.no_grad():
        adapter_set(net).adapters("default")["0"].ia3_l[2] = 0  # type: ignore[index]
    net.merge_adapter()
    assert net[0].weight[2].abs().max() == 0
    net.unmerge_adapter()
    assert torch.equal(net[0].weight, weight)


def test_a_vector_costs_one_number_a_feature() -> None:
    for feedforward, count in ((True, 6), (False, 5)):
        net, _ = adapted(nn.Linear(6, 5), feedforward)
        assert net.get_nb_trainable_parameters()[0] == count


@pytest.mark.parametrize("feedforward", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(feedforward: bool, groups: int, tmp_path: Any) -> None:
    options = {"feedforward_modules": ["0"] if feedforward else []}
    layer, x = nn.Conv2d(6, 8, 3, padding=1, groups=groups), torch.randn(2, 6, 5, 5)
    for merged in (False, True):
        agrees_with_peft(layer, x, "IA3Config", IA3Config, options, tmp_path / str(merged), merged=merged)
    net, _ = adapted(nn.Conv2d(6, 8, 3, groups=groups), feedforward)
    x = x.double()
    before = net(x)
    net.merge_adapter()
    torch.testing.assert_close(net(x), before, rtol=1e-12, atol=1e-12)


def test_names_are_path_segments_and_a_string_is_a_regular_expression() -> None:
    config = IA3Config(target_modules=["dense", "k"], feedforward_modules=["output.dense"])
    assert config.is_feedforward("layer.0.output.dense") and not config.is_feedforward("layer.0.xoutput.dense")
    config = IA3Config(target_modules=["dense"], feedforward_modules=r".*\.1\.dense")
    assert config.is_feedforward("layer.1.dense") and not config.is_feedforward("layer.0.dense")


def test_the_directory_says_every_choice(tmp_path: Any) -> None:
    blocks = nn.Module()
    blocks.layers = nn.ModuleList(nn.ModuleDict({"k": nn.Linear(4, 4), "down": nn.Linear(4, 4)}) for _ in range(2))
    config = IA3Config(target_modules=["k", "down"], feedforward_modules=["down"], layers_to_transform=[1])
    get_peft_model(blocks, config).save_pretrained(tmp_path)
    saved: Any = PeftConfig.from_pretrained(tmp_path)
    assert saved.target_modules == {"layers.1.k", "layers.1.down"} and saved.layers_to_transform is None
    assert saved.feedforward_modules == {"layers.1.down"}
    plain: Any = blocks
    again: Any = PeftModel.from_pretrained(plain.unload(), tmp_path)
    assert set(adapter_set(again).layers) == {"layers.1.k", "layers.1.down"}


def test_impossible_options() -> None:
    with pytest.raises(ConfigError, match="'fc2' is not among target_modules"):
        IA3Config(target_modules=["k"], feedforward_modules=["fc2"])
    with pytest.raises(ConfigError, match="token ids"):
        get_peft_model(nn.Sequential(nn.Embedding(5, 3)), IA3Config(target_modules=["0"], feedforward_modules=["0"]))
