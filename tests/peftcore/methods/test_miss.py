"""What the MiSS paper says of its shards, and what MiSS must refuse."""

import json
from pathlib import Path

import pytest
import torch
from dropout_facts import assert_dropout_keeps_the_mean
from method_example import Example, randomise
from safetensors.torch import load_file, save_file
from torch import nn

from peftcore import ConfigError, PeftModel, get_peft_model
from peftcore.methods.miss import MissConfig

EXAMPLE = Example(
    MissConfig,
    options={"r": 4},
    layers={
        "Conv1D": {"init_weights": "bat"},
        "Linear without bias": {"init_weights": "mini", "mini_r": 2, "r": 5},
    },
    theirs="MissConfig",
    parity={
        "plain": {"r": 8},
        "rows that are left over": {"r": 5},
        "bat": {"r": 4, "init_weights": "bat"},
        "mini": {"r": 5, "init_weights": "mini", "mini_r": 4},
        "random": {"r": 8, "init_weights": False},
        "biases": {"r": 8, "bias": "MiSS_only"},
    },
    families=("llama", "bert", "t5"),
)


def adapted(i: int, o: int, **options) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """(net, base weight, D), the adapter away from its start."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(i, o, bias=False)).double()
    weight = net[0].weight.clone()
    net = get_peft_model(net, MissConfig(target_modules=["0"], **options))
    randomise(net, 0.3)
    return net, weight, net[0].adapters["default"].miss_block.detach()


def test_every_shard_of_the_input_shares_one_block() -> None:
    net, weight, d = adapted(8, 6, r=3)  # shards 0..2, 3..5 and 6..7
    x = torch.randn(4, 8, dtype=torch.float64)
    expected = x @ weight.T + (x[:, 0:3] + x[:, 3:6]) @ d + x[:, 6:8] @ d[:2]
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)


def test_mini_repeats_its_columns_over_the_outputs() -> None:
    net, weight, d = adapted(6, 6, r=3, init_weights="mini", mini_r=2)
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = x @ weight.T + (x[:, :3] + x[:, 3:]) @ torch.cat([d, d, d], 1)
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)


def test_bat_multiplies_each_block_of_the_weight() -> None:
    net, weight, d = adapted(6, 4, r=2, init_weights="bat")
    expected = weight.clone()
    for row in range(2):
        for column in range(3):
            block = weight[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            expected[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += block @ d[row] + d[row]
    torch.testing.assert_close(net(torch.eye(6, dtype=torch.float64)).T, expected, rtol=1e-12, atol=1e-12)


def test_bat_needs_the_weight_below_it_also_when_another_adapter_is_active() -> None:
    net, _, _ = adapted(6, 4, r=2, init_weights="bat")
    net.add_adapter("other", MissConfig(r=2, init_weights="bat", target_modules=["0"]))
    randomise(net, 0.3)
    net.set_adapter(["other", "default"])
    x = torch.randn(3, 6, dtype=torch.float64)
    both = net(x)
    net.merge_adapter()
    torch.testing.assert_close(net(x), both, rtol=1e-12, atol=1e-12)


def test_parameters_are_r_for_each_output() -> None:
    for options, count in (({}, 4 * 8), ({"init_weights": "bat"}, 4 * 8), ({"init_weights": "mini", "mini_r": 2}, 8)):
        net = get_peft_model(nn.Sequential(nn.Linear(16, 8)), MissConfig(r=4, target_modules=["0"], **options))
        assert net.get_nb_trainable_parameters()[0] == count


def test_dropout_acts_while_training_only_and_keeps_the_mean() -> None:
    net, _, _ = adapted(64, 4, r=8, miss_dropout=0.4)
    x = torch.randn(1, 64, dtype=torch.float64)
    assert_dropout_keeps_the_mean(net, x)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r": 0}, "r must be a positive integer; got 0"),
        ({"mini_r": 0}, "mini_r must be a positive integer; got 0"),
        ({"miss_dropout": 1.0}, "below 1; got 1.0"),
        ({"bias": "lora_only"}, "MiSS_only"),
        ({"init_weights": "small"}, "'bat', 'mini'; got 'small'"),
        ({"r": 9}, "at most the 8 inputs of 0, got 9"),
        ({"r": 3, "init_weights": "bat"}, "must divide 8 and 4, got 3; try 4"),
        ({"r": 4, "init_weights": "mini", "mini_r": 3}, "mini_r must divide the 4 outputs of 0, got 3"),
    ],
)
def test_impossible_options(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_peft_model(nn.Sequential(nn.Linear(8, 4)), MissConfig(target_modules=["0"], **options))


def test_the_error_about_bone_says_how_to_read_it_as_miss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Linear(8, 4)
    net, x = get_peft_model(nn.Sequential(base), MissConfig(r=2, target_modules=["0"])), torch.randn(3, 8)
    randomise(net, 0.3)
    net.save_pretrained(tmp_path)
    expected, file, config = net(x), tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file({key.replace("miss", "bone"): tensor for key, tensor in load_file(file).items()}, file)
    (tmp_path / "SHA256SUMS").unlink()
    saved = json.loads(config.read_text())
    config.write_text(json.dumps(saved | {"peft_type": "BONE"}))
    plain = net.unload()
    with pytest.raises(ConfigError, match=r"BONE: it is MISS since 0\.19.* key_mapping=\{'bone_block': 'miss_block'\}"):
        PeftModel.from_pretrained(plain, tmp_path)
    config.write_text(json.dumps(saved))
    again = PeftModel.from_pretrained(plain, tmp_path, key_mapping={"bone_block": "miss_block"})
    torch.testing.assert_close(again(x), expected, rtol=0, atol=0)
