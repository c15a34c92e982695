"""What the WaveFT paper says, what makes a filter a wavelet, and PEFT's update for each family it can compute."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from method_example import Example, randomise
from torch import nn

from peftcore import ConfigError, PeftModel, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.waveft import FAMILIES, WaveFTConfig, scaling_filter

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the oracle warns of on import is its own affair
    import peft
    from peft.tuners.waveft.wavelet import Wavelet

EXAMPLE = Example(
    WaveFTConfig,
    options={"n_frequency": 20, "scaling": 4.0, "wavelet_family": "db2"},
    sized=False,
    theirs="WaveFTConfig",
    parity={
        "plain": {"n_frequency": 50},
        "symlet": {"n_frequency": 50, "wavelet_family": "sym5", "random_loc_seed": 5, "init_weights": False},
        "coiflet": {"n_frequency": 50, "scaling": 9.0, "wavelet_family": "coif2"},
        "direct": {"n_frequency": 50, "use_idwt": False},
        "pattern": {"n_frequency": 50, "n_frequency_pattern": {"q_proj": 70, "0.mlp.c_proj": 30, "dense": 20}},
        "proportional": {"n_frequency": 50, "proportional_parameters": True},
        "biases": {"n_frequency": 50, "bias": "waveft_only"},
    },
)
WAVELETS = [family for family in FAMILIES if family != "coif4"]  # PEFT's coif4 is none
COMPUTED_BY_PEFT = [family for family in FAMILIES if not family.startswith("db") or int(family[2:]) <= 10]


def net(*shapes: tuple[int, int], **options: Any) -> Any:
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Linear(i, o) for o, i in shapes or [(8, 12)])).double()
    return get_peft_model(plain, WaveFTConfig(**{"n_frequency": 10, "target_modules": r"\d+", **options}))


def layers(model: Any) -> list[Any]:
    return list(adapter_set(model).adapters("default").values())


# -- filters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", WAVELETS)
def test_filters_are_orthonormal_with_vanishing_moments(family: str) -> None:
    taps = torch.tensor(scaling_filter(family), dtype=torch.float64)
    order = int("".join(filter(str.isdigit, family)))
    assert len(taps) == (6 if family.startswith("coif") else 2) * order
    assert abs(taps.sum().item() - math.sqrt(2)) < 1e-11
    for shift in range(len(taps) // 2):
        product = taps[2 * shift :] @ taps[: len(taps) - 2 * shift]
        assert abs(product.item() - (shift == 0)) < 1e-10
    signs = torch.tensor([(-1.0) ** k for k in range(len(taps))], dtype=torch.float64)
    at = torch.linspace(-1, 1, len(taps), dtype=torch.float64)
    for power in range(2 * order if family.startswith("coif") else order):
        assert abs((signs * taps * at**power).sum().item()) < 1e-10


@pytest.mark.parametrize("family", COMPUTED_BY_PEFT)
def test_filters_are_those_that_peft_uses(family: str) -> None:
    torch.testing.assert_close(scaling_filter(family), tuple(Wavelet(family).rec_lo), rtol=0, atol=1e-11)


def test_symlets_are_nearer_to_symmetry_than_daubechies_filters() -> None:
    def lopsided(family: str) -> float:
        taps = torch.tensor(scaling_filter(family), dtype=torch.float64).abs()
        return (taps - taps.flip(0)).norm().item()

    assert all(lopsided(f"sym{n}") < lopsided(f"db{n}") for n in range(4, 11))


# -- updates ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", [(10, 14), (9, 13)], ids=["even", "odd"])
@pytest.mark.parametrize("family", COMPUTED_BY_PEFT)
def test_the_update_is_pefts(family: str, shape: tuple[int, int], tmp_path: Path) -> None:
    options: dict[str, Any] = {"n_frequency": 60, "wavelet_family": family, "target_modules": ["0"]}
    hf = peft.get_peft_model(nn.Sequential(nn.Linear(shape[1], shape[0])), peft.WaveFTConfig(**options))
    randomise(hf, 0.3)
    hf.save_pretrained(tmp_path)
    here = layers(PeftModel.from_pretrained(nn.Sequential(nn.Linear(shape[1], shape[0])), tmp_path))[0]
    expected = hf.base_model.model[0].get_delta_weight("default")
    torch.testing.assert_close(here.delta_weight(), expected, rtol=1e-5, atol=1e-5)


def test_one_haar_coefficient_is_one_square() -> None:
    """Over 2 × 2 weights: level in the top left quarter of the coefficients, differences in the others."""
    adapter = layers(net((4, 6), n_frequency=24, scaling=2.0))[0]
    signs = {(0, 0): [1, 1, 1, 1], (0, 1): [1, 1, -1, -1], (1, 0): [1, -1, 1, -1], (1, 1): [1, -1, -1, 1]}
    # place k of the permutation is row place // 6, column place % 6 of PEFT's coefficients
    order = torch.randperm(24, generator=torch.Generator().manual_seed(777))
    for k, place in enumerate(order.tolist()):
        row, column = divmod(place, 6)
        with torch.no_grad():
            adapter.waveft_spectrum.zero_()[k] = 1.0
        expected = torch.zeros(4, 6, dtype=torch.float64)
        top, left = row % 2 * 2, column % 3 * 2
        square = torch.tensor(signs[row // 2, column // 3], dtype=torch.float64).view(2, 2)
        expected[top : top + 2, left : left + 2] = 2.0 * square / 2
        torch.testing.assert_close(adapter.delta_weight(), expected)


def test_haar_keeps_the_norm_of_the_coefficients() -> None:
    adapter = layers(net((8, 12), n_frequency=40, scaling=3.0, init_weights=False))[0]
    torch.testing.assert_close(adapter.delta_weight().norm(), 3.0 * adapter.waveft_spectrum.norm())


def test_without_the_transform_the_trained_numbers_are_entries() -> None:
    adapter = layers(net(n_frequency=10, scaling=3.0, use_idwt=False, init_weights=False))[0]
    delta = adapter.delta_weight().flatten()
    assert torch.equal(delta[adapter.places], 3.0 * adapter.waveft_spectrum) and int((delta != 0).sum()) == 10


def test_start_values() -> None:
    assert layers(net())[0].waveft_spectrum.abs().max() == 0
    spectrum = layers(net((40, 60), n_frequency=2000, init_weights=False))[0].waveft_spectrum
    assert abs(spectrum.std().item() / 0.01 - 1) < 0.06


def test_proportional_shares_follow_the_sizes() -> None:
    model = net((8, 12), (2, 8), n_frequency=28, proportional_parameters=True, n_frequency_pattern={"0": 3})
    assert [len(adapter.waveft_spectrum) for adapter in layers(model)] == [48, 8]  # 2 · 28 over 96 and 16 weights
    tiny = net((40, 60), (1, 40), n_frequency=1, proportional_parameters=True)
    assert [len(adapter.waveft_spectrum) for adapter in layers(tiny)] == [2, 1]  # never none


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_frequency": 0}, "n_frequency must be a positive integer; got 0"),
        ({"wavelet_family": "coif5"}, "'coif4'; got 'coif5'"),
        ({"random_loc_seed": 1.5}, "must be an integer; got 1.5"),
        ({"bias": "fourier_only"}, "'waveft_only'; got 'fourier_only'"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WaveFTConfig(**options)


def test_no_more_coefficients_than_weights() -> None:
    with pytest.raises(ConfigError, match="n_frequency at 0 must be between 1 and 96 weights; got 97"):
        net(n_frequency=97)
