"""What the FourierFT paper says: a few trained entries of the update's spectrum, at places that a seed draws."""

import math
from typing import Any

import pytest
import torch
from method_example import Example, randomise
from torch import nn

from peftcore import ConfigError, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.fourierft import FourierFTConfig

EXAMPLE = Example(
    FourierFTConfig,
    options={"n_frequency": 20, "scaling": 40.0},
    starts_at_base=False,
    sized=False,
    theirs="FourierFTConfig",
    parity={
        "plain": {"n_frequency": 50},
        "another seed": {"n_frequency": 50, "scaling": 250.0, "random_loc_seed": 5, "init_weights": True},
        "pattern": {"n_frequency": 50, "n_frequency_pattern": {"q_proj": 70, "0.mlp.c_proj": 30, "dense": 20}},
        "biases": {"n_frequency": 50, "bias": "fourier_only"},
    },
)


def net(layer: nn.Module | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    plain = nn.Sequential(layer or nn.Linear(6, 5), nn.Linear(5, 6), nn.Linear(6, 5)).double()
    defaults = {"n_frequency": 8, "scaling": 30.0, "target_modules": ["0", "1", "2"]}
    return get_peft_model(plain, FourierFTConfig(**{**defaults, **options}))


def layers(model: Any) -> list[Any]:
    return list(adapter_set(model).adapters("default").values())


def test_the_update_is_a_sum_of_plane_waves() -> None:
    """The real part of the inverse transform, wave by wave: c/(o i) · cos(2π(u p/o + v q/i))."""
    adapter = layers(net())[0]
    p, q = torch.meshgrid(torch.arange(5.0).double(), torch.arange(6.0).double(), indexing="ij")
    waves = [
        c * torch.cos(2 * math.pi * (int(place) // 6 * p / 5 + int(place) % 6 * q / 6)) / 30
        for c, place in zip(adapter.fourierft_spectrum, adapter.places, strict=True)
    ]
    torch.testing.assert_close(adapter.delta_weight(), 30.0 * sum(waves), rtol=1e-12, atol=1e-12)


def test_places_are_distinct_and_the_same_for_layers_of_one_shape() -> None:
    first, _, third = layers(net())
    assert len(set(first.places.tolist())) == 8 and first.places.min() >= 0 and first.places.max() < 30
    assert torch.equal(first.places, third.places)
    assert not torch.equal(first.places, layers(net(random_loc_seed=778))[0].places)


def test_start_values() -> None:
    spectrum = layers(net(nn.Linear(60, 50), n_frequency=2000, target_modules=["0"]))[0].fourierft_spectrum
    assert abs(spectrum.std().item() - 1) < 0.06
    assert layers(net(init_weights=True))[0].fourierft_spectrum.abs().max() == 0


def test_a_convolution_is_adapted_as_the_matrix_of_its_patches() -> None:
    dense = layers(net(nn.Linear(18, 8), target_modules=["0"]))[0]
    grouped = layers(net(nn.Conv2d(4, 8, 3, groups=2), target_modules=["0"]))[0]
    assert grouped.delta_weight().shape == (8, 2, 3, 3)
    with torch.no_grad():
        grouped.fourierft_spectrum.copy_(dense.fourierft_spectrum)
    torch.testing.assert_close(grouped.delta_weight().flatten(1), dense.delta_weight())


def test_half_precision_bases_transform_in_float32() -> None:
    config = FourierFTConfig(n_frequency=8, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)).bfloat16(), config)
    randomise(model, 0.1)
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    assert model(x).dtype == torch.bfloat16
    assert layers(model)[0].delta_weight().dtype == torch.float32


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_frequency": 0}, "n_frequency must be a positive integer; got 0"),
        ({"random_loc_seed": None}, "must be an integer; got None"),
        ({"bias": "fourierft_only"}, "'fourier_only'; got 'fourierft_only'"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FourierFTConfig(**options)


def test_no_more_frequencies_than_weights() -> None:
    with pytest.raises(ConfigError, match="n_frequency at 1 must be between 1 and the 30 weights; got 31"):
        net(n_frequency_pattern={"1": 31})
