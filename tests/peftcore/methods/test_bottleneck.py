"""What the papers of bottleneck adapters say: a small network after a layer or beside it, added to its output."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from method_example import Example, randomise
from prompt_models import build
from safetensors.torch import load_file
from torch import nn

from peftcore import ConfigError, LoraConfig, MergeError, PeftModel, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.bottleneck import BottleneckConfig

EXAMPLE = Example(BottleneckConfig, options={"bottleneck_size": 3, "non_linearity": "tanh"}, merges=False)


def net(**options: Any) -> Any:
    torch.manual_seed(0)
    config = BottleneckConfig(**{"bottleneck_size": 3, "target_modules": ["0"], **options})
    model = get_peft_model(nn.Sequential(nn.Linear(12, 8)).double(), config)
    randomise(model, 0.5)
    return model


def adapter_of(model: Any) -> Any:
    return adapter_set(model).adapters("default")["0"]


X = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("style", ["houlsby", "pfeiffer"])
def test_a_sequential_adapter_reads_the_layers_output(style: str) -> None:
    model = net(style=style, non_linearity="gelu", scaling=0.7)
    adapter, layer = adapter_of(model), model[0].base_layer
    for x, y in zip(X, model(X), strict=True):
        base = layer.weight @ x + layer.bias
        inner = nn.functional.gelu(adapter.bottleneck_down @ base + adapter.bottleneck_down_bias)
        expected = base + 0.7 * (adapter.bottleneck_up @ inner + adapter.bottleneck_up_bias)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_a_parallel_adapter_reads_the_layers_input() -> None:
    model = net(style="parallel")
    adapter, layer = adapter_of(model), model[0].base_layer
    for x, y in zip(X, model(X), strict=True):
        inner = (adapter.bottleneck_down @ x + adapter.bottleneck_down_bias).clamp(min=0)
        change = 4.0 * (adapter.bottleneck_up @ inner + adapter.bottleneck_up_bias)
        torch.testing.assert_close(y, layer.weight @ x + layer.bias + change, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scaling, size", [("learned", 1), ("channel", 8)])
def test_a_learned_scaling_starts_at_one_and_scales_the_change(scaling: str, size: int) -> None:
    plain, model = net(scaling=1.0), net(scaling=scaling)
    own = adapter_of(model).bottleneck_scaling
    assert own.shape == (size,)
    model.load_state_dict({**plain.state_dict(), "0.bottleneck_scaling.default": torch.ones(size)})
    torch.testing.assert_close(model(X), plain(X))
    base = model[0].base_layer(X)
    factors = torch.arange(1.0, size + 1, dtype=torch.float64) + 1
    with torch.no_grad():
        own.copy_(factors)
    torch.testing.assert_close(model(X) - base, factors * (plain(X) - base))


def test_without_activation_and_bias_the_parallel_adapter_is_a_lora() -> None:
    model = net(style="parallel", non_linearity="linear", scaling=2.0)
    adapter = adapter_of(model)
    with torch.no_grad():
        adapter.bottleneck_down_bias.zero_()
        adapter.bottleneck_up_bias.zero_()
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 8)).double()
    lora: Any = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules=["0"]))
    with torch.no_grad():
        lora[0].lora_A["default"].weight.copy_(adapter.bottleneck_down)
        lora[0].lora_B["default"].weight.copy_(adapter.bottleneck_up)
    torch.testing.assert_close(model(X), lora(X))


def test_dropout_drops_elements_of_the_change_in_training_only() -> None:
    model = net(dropout=0.5)
    base, change = model[0].base_layer(X), model.eval()(X) - model[0].base_layer(X)
    model.train()
    dropped = model(X) - base
    kept = dropped.abs() > 1e-9
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(dropped[kept], 2 * change[kept])


DEFAULTS = {
    "llama": {
        "houlsby": {"self_attn.o_proj", "mlp.down_proj"},
        "pfeiffer": {"mlp.down_proj"},
        "parallel": {"mlp.down_proj"},
    },
    "gpt2": {"houlsby": {"attn.c_proj", "mlp.c_proj"}, "pfeiffer": {"mlp.c_proj"}, "parallel": {"mlp.c_proj"}},
    "bert-cls": {
        "houlsby": {"attention.output.dense", "output.dense"},
        "pfeiffer": {"output.dense"},
        "parallel": {"output.dense"},
    },
}


@pytest.mark.parametrize("family", DEFAULTS)
@pytest.mark.parametrize("style", ["houlsby", "pfeiffer", "parallel"])
def test_default_targets_of_a_style(family: str, style: str) -> None:
    model = get_peft_model(build(family), BottleneckConfig(style=style))
    inside_blocks = [path.split(".") for path in adapter_set(model).layers]
    found = {
        ".".join(path[path.index(number) + 1 :]) for path in inside_blocks for number in ("0", "1") if number in path
    }
    assert found == DEFAULTS[family][style]
    assert len(inside_blocks) == 2 * len(found), "two blocks"


def test_sizes_and_defaults_are_those_of_each_style() -> None:
    houlsby, parallel = net(bottleneck_size=None), net(bottleneck_size=None, style="parallel")
    assert (houlsby.peft_config["default"].reduction_factor, adapter_of(houlsby).bottleneck_down.shape) == (16, (1, 8))
    assert (parallel.peft_config["default"].reduction_factor, adapter_of(parallel).bottleneck_down.shape) == (
        2,
        (4, 12),
    )
    assert [BottleneckConfig(style=style).scaling for style in DEFAULTS["llama"]] == [1, 1, 4]
    assert [BottleneckConfig(style=style).non_linearity for style in DEFAULTS["llama"]] == ["swish", "relu", "relu"]


def test_a_directory_says_all_that_loading_needs(tmp_path: Path) -> None:
    model = net(scaling="learned", style="parallel")
    model.save_pretrained(tmp_path)
    names = ("down", "down_bias", "scaling", "up", "up_bias")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors.keys() == {f"base_model.model.0.bottleneck_{name}" for name in names}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "BOTTLENECK"
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(nn.Sequential(nn.Linear(12, 8)).double(), tmp_path)
    assert torch.equal(again(X), model(X))


def test_no_weight_equals_the_adapter() -> None:
    with pytest.raises(MergeError, match="a bottleneck adapter is not linear"):
        net().merge_and_unload()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"style": "compacter"}, "style must be one of 'houlsby', 'pfeiffer', 'parallel'; got 'compacter'"),
        ({"bottleneck_size": 0}, "bottleneck_size must be a positive integer; got 0"),
        ({"bottleneck_size": 4, "reduction_factor": 2.0}, "give reduction_factor or bottleneck_size, not both"),
        ({"reduction_factor": 0.5}, "reduction_factor must be at least 1; got 0.5; .* give bottleneck_size"),
        ({"non_linearity": "rellu"}, "unknown non_linearity 'rellu'.*relu"),
        ({"scaling": "none"}, "scaling must be one of 'learned', 'channel'; got 'none'"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1; got 1.0"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BottleneckConfig(**options)
