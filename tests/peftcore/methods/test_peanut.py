"""What the PEANuT paper says: a small network computes the change of the weight from the weight itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from method_example import Example, randomise
from safetensors.torch import load_file
from torch import nn

from peftcore import ConfigError, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.peanut import PeanutConfig

EXAMPLE = Example(
    PeanutConfig,
    options={"r": 3, "depth": 1},
    theirs="PeanutConfig",
    parity={
        "no inner layers": {"r": 4},
        "deep": {"r": 4, "depth": 3, "act_fn": "gelu", "scaling": 0.5},
    },
    families=("llama", "bert"),  # PEFT's PEANuT knows no Conv1D
)


def net(**options: Any) -> Any:
    torch.manual_seed(0)
    config = PeanutConfig(**{"r": 3, "target_modules": ["0"], **options})
    return get_peft_model(nn.Sequential(nn.Linear(12, 8)).double(), config)


def adapter_of(model: Any, name: str = "default") -> Any:
    return adapter_set(model).adapters(name)["0"]


def test_the_papers_formula() -> None:
    """Column by column of W: A, two encoders, two decoders with the results of their level, and B."""
    model = net(depth=2, act_fn="tanh", scaling=0.7)
    randomise(model, 0.5)
    adapter, layer = adapter_of(model), model[0].base_layer
    change = torch.empty(8, 12, dtype=torch.float64)
    for column in range(12):
        h0 = torch.tanh(adapter.peanut_A @ layer.weight[:, column])
        h1 = torch.tanh(adapter.peanut_encoders[0] @ h0)
        h2 = torch.tanh(adapter.peanut_encoders[1] @ h1)
        up = torch.tanh(adapter.peanut_decoders[0] @ h2) + h1
        up = torch.tanh(adapter.peanut_decoders[1] @ up) + h0
        change[:, column] = 0.7 * adapter.peanut_B @ up
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ (layer.weight + change).T + layer.bias, rtol=1e-12, atol=1e-12)


def test_without_inner_layers_and_activation_the_change_is_a_product_with_the_weight() -> None:
    model = net(act_fn="linear")
    randomise(model, 0.5)
    adapter = adapter_of(model)
    expected = adapter.peanut_B @ adapter.peanut_A @ model[0].base_layer.weight
    torch.testing.assert_close(adapter.delta_weight(), expected)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_rank_is_bound_by_the_width_and_parameters_grow_with_depth(depth: int) -> None:
    model = net(depth=depth)
    assert model.get_nb_trainable_parameters()[0] == 3 * 8 + 8 * 3 + 2 * depth * 9
    randomise(model, 0.5)
    assert torch.linalg.matrix_rank(adapter_of(model).delta_weight()) <= 3


def test_the_second_of_two_merged_adapters_reads_the_weight_without_the_first() -> None:
    model = net()
    model.add_adapter("second", PeanutConfig(r=2, target_modules=["0"]))
    model.set_requires_grad("second")
    randomise(model, 0.5)
    weight = model[0].base_layer.weight.clone()
    changes = [adapter_of(model, name).delta_weight() for name in ("default", "second")]
    model.merge_adapter(["default", "second"])
    torch.testing.assert_close(model[0].base_layer.weight, weight + changes[0] + changes[1])


def test_keys_of_a_directory(tmp_path: Path) -> None:
    net(depth=2).save_pretrained(tmp_path)
    start = "base_model.model.0.peanut_"
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == {
        *(f"{start}{side}.weight" for side in "AB"),
        *(f"{start}{kind}.{number}.weight" for kind in ("encoders", "decoders") for number in (0, 1)),
    }


def test_a_layer_shows_its_network_as_in_peft() -> None:
    layer: Any = net(depth=2)[0]
    encoders = layer.peanut_encoders["default"]
    assert layer.res_num["default"] == len(encoders) == 2
    assert encoders[1].weight is adapter_of_layer(layer).peanut_encoders[1]
    with pytest.raises(IndexError, match="2 elements; got 2"):
        _ = encoders[2]
    assert [module.weight.shape for module in layer.peanut_decoders["default"]] == [(3, 3)] * 2


def adapter_of_layer(layer: Any) -> Any:
    return layer.adapters["default"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r": 0}, "r must be a positive integer; got 0"),
        ({"depth": -1}, "depth must be 0 or a positive integer; got -1; try 0"),
        ({"act_fn": "rellu"}, "unknown act_fn 'rellu'.*relu"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PeanutConfig(**options)
