"""What the VeRA paper says: one frozen pair of projections for all layers, two vectors per layer."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from method_example import Example, randomise
from safetensors.torch import load_file
from torch import nn

from peftcore import CheckpointError, ConfigError, PeftModel, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.vera import VeraConfig

EXAMPLE = Example(
    VeraConfig,
    options={"r": 5, "d_initial": 0.4},
    theirs="VeraConfig",
    parity={
        "plain": {"r": 8},
        "drawn again": {"r": 8, "save_projection": False, "projection_prng_key": 42},
        "biases": {"r": 3, "bias": "vera_only", "init_weights": False},
    },
    spread=1.0,
)


def net(**options: Any) -> Any:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(7, 12), nn.Linear(12, 5)).double()
    return get_peft_model(plain, VeraConfig(**{"r": 4, "target_modules": ["0", "1"], **options}))


def layers(model: Any) -> list[Any]:
    return list(adapter_set(model).adapters("default").values())


def test_the_papers_formula() -> None:
    model = net()
    weights = [(host.base_layer.weight.clone(), host.base_layer.bias.clone()) for host in model]
    randomise(model, 0.5)
    x = torch.randn(3, 7, dtype=torch.float64)
    expected = x
    for adapter, (weight, bias) in zip(layers(model), weights, strict=True):
        o, i = weight.shape
        a, b = adapter.shared.vera_A[:, :i], adapter.shared.vera_B[:o]
        delta = torch.diag(adapter.vera_lambda_b) @ b @ torch.diag(adapter.vera_lambda_d) @ a
        expected = expected @ (weight + delta).T + bias
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_layers_share_one_frozen_pair_and_train_two_vectors_each() -> None:
    model = net()
    first, second = layers(model)
    assert first.shared is second.shared
    assert first.shared.vera_A.shape == (4, 12) and first.shared.vera_B.shape == (12, 4)
    assert model.get_nb_trainable_parameters()[0] == (4 + 12) + (4 + 5)
    before = first.shared.vera_A.clone()
    model(torch.randn(3, 7, dtype=torch.float64)).square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    assert torch.equal(first.shared.vera_A, before)


def test_start_values() -> None:
    adapter = layers(net(d_initial=0.25))[0]
    assert torch.equal(adapter.vera_lambda_b, torch.zeros(12).double())
    assert torch.equal(adapter.vera_lambda_d, torch.full((4,), 0.25).double())
    wide = get_peft_model(nn.Sequential(nn.Linear(600, 500)), VeraConfig(r=64, target_modules=["0"]))
    shared = layers(wide)[0].shared
    for drawn, fan in ((shared.vera_A, 600), (shared.vera_B, 64)):  # Kaiming uniform: variance 2 / fan
        assert abs(drawn.std().item() / math.sqrt(2 / fan) - 1) < 0.02
        assert drawn.abs().max() <= math.sqrt(6 / fan)


def test_the_key_alone_decides_the_projections() -> None:
    one, again, other = (layers(net(projection_prng_key=key))[0].shared.vera_A for key in (3, 3, 4))
    torch.manual_seed(99)
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:Specified to not save")
@pytest.mark.parametrize("save", [True, False])
def test_a_directory_with_and_without_projections(save: bool, tmp_path: Path) -> None:
    model = net(save_projection=save, projection_prng_key=11)
    randomise(model, 0.5)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert ({"base_model.vera_A", "base_model.vera_B"} <= keys) == save
    x = torch.randn(3, 7, dtype=torch.float64)
    expected = model(x)
    assert torch.equal(PeftModel.from_pretrained(model.unload(), tmp_path)(x), expected)


@pytest.mark.filterwarnings("ignore:Specified to not save")
def test_missing_projections_are_an_error(tmp_path: Path) -> None:
    model = net(save_projection=False)
    model.save_pretrained(tmp_path)
    config = VeraConfig(r=4, target_modules=["0", "1"], save_projection=True)
    with pytest.raises(CheckpointError, match=r"missing base_model\.vera_A"):
        PeftModel.from_pretrained(model.unload(), tmp_path, config=config)


def test_dropout_acts_while_training_only() -> None:
    model = net(vera_dropout=0.5, init_weights=False)
    x = torch.randn(3, 7, dtype=torch.float64)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r": 0}, "r must be a positive integer; got 0"),
        ({"vera_dropout": 1.0}, "below 1; got 1.0"),
        ({"bias": "lora_only"}, "'vera_only'; got 'lora_only'"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VeraConfig(**options)
