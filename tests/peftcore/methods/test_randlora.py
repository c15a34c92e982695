"""What the RandLoRA paper says: a full-rank update from random bases that no layer trains."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from method_example import Example, randomise
from safetensors.torch import load_file, save_file
from torch import nn

from peftcore import ConfigError, PeftModel, get_peft_model
from peftcore.files import MANIFEST
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.randlora import RandLoraConfig

EXAMPLE = Example(
    RandLoraConfig,
    options={"r": 3, "randlora_alpha": 6},
    theirs="RandLoraConfig",
    parity={
        "plain": {"r": 6, "randlora_alpha": 12},
        "drawn again": {"r": 8, "randlora_alpha": 8, "save_projection": False, "projection_prng_key": 7},
        "sparse": {"r": 6, "randlora_alpha": 12, "sparse": True, "save_projection": False},
        "very sparse": {"r": 6, "randlora_alpha": 12, "very_sparse": True, "save_projection": False},
        "biases": {"r": 4, "randlora_alpha": 4, "bias": "randlora_only"},
    },
    spread=0.1,
)
BASES = ("randlora_A", "randlora_B")


def net(sizes: tuple[int, ...] = (7, 12, 5), **options: Any) -> Any:
    torch.manual_seed(0)
    linears = [nn.Linear(i, o) for i, o in itertools.pairwise(sizes)]
    config = RandLoraConfig(**{"r": 3, "randlora_alpha": 6, **options}, target_modules=r"\d+")
    return get_peft_model(nn.Sequential(*linears).double(), config)


def layers(model: Any) -> list[Any]:
    return list(adapter_set(model).adapters("default").values())


@pytest.mark.parametrize("at", [0, 1], ids=["wide output", "wide input"])
def test_the_papers_sum_over_bases(at: int) -> None:
    """Term by term, with A on the smaller side and the same pairing of columns of B and rows of A as PEFT's."""
    model = net()
    randomise(model, 0.5)
    adapter = layers(model)[at]
    small, large, r, n = *sorted((7, 12) if at == 0 else (12, 5)), 3, len(adapter.randlora_gamma)
    assert n == math.ceil(small / r)
    columns = [adapter.shared.randlora_B[:large, b, k] for b in range(n) for k in range(r)]
    rows = [
        adapter.randlora_lambda[k, b] * adapter.shared.randlora_A[k, 0, :small] * adapter.randlora_gamma[b]
        for k in range(r)
        for b in range(n)
    ]
    delta = 6 / 3 * sum(torch.outer(column, row) for column, row in zip(columns, rows, strict=True))
    expected = delta if at == 0 else delta.T
    torch.testing.assert_close(adapter.delta_weight(), expected, rtol=1e-12, atol=1e-12)


def test_the_update_has_full_rank() -> None:
    model = net((24, 40), r=2)
    randomise(model, 0.5)
    assert torch.linalg.matrix_rank(layers(model)[0].delta_weight()) == 24


def test_parameters_and_start() -> None:
    model = net((24, 40), r=4)
    assert model.get_nb_trainable_parameters()[0] == 4 * 6 + 6 * 24
    adapter = layers(model)[0]
    assert adapter.randlora_lambda.abs().max() == 0
    assert torch.equal(adapter.randlora_gamma, torch.full((6, 24), 1 / 24, dtype=torch.float64))
    adapter = layers(net((24, 40), r=4, init_weights=False))[0]
    assert adapter.randlora_lambda.std() > 0.5
    assert torch.equal(adapter.randlora_gamma, torch.full((6, 24), 1 / 40, dtype=torch.float64))


def test_bases_have_unit_deviation_and_depend_on_the_key_alone() -> None:
    one, again, other = (layers(net((64, 96), r=16, projection_prng_key=key))[0].shared for key in (5, 5, 6))
    assert torch.equal(one.randlora_B, again.randlora_B) and not torch.equal(one.randlora_B, other.randlora_B)
    assert abs(one.randlora_A.std() - 1) < 0.01 and abs(one.randlora_B.std() - 1) < 0.01


@pytest.mark.parametrize("option, rare", [("sparse", 1 / 6), ("very_sparse", 1 / (2 * math.sqrt(64)))])
def test_sparse_bases_are_ternary_with_the_papers_probabilities(option: str, rare: float) -> None:
    bases = layers(net((64, 96), r=16, **{option: True}))[0].shared.randlora_B
    values = bases.unique()
    assert len(values) == 3 and values[1] == 0 and values[0] == -values[2]
    for sign in (-1, 1):
        share = (bases.sign() == sign).double().mean().item()
        assert abs(share - rare) < 4 * math.sqrt(rare / bases.numel())


def test_bases_are_saved_once_and_pefts_repeats_are_read(tmp_path: Path) -> None:
    model = net()
    randomise(model, 0.5)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    assert [key for key in tensors if "randlora_B" in key] == ["base_model.randlora_B"]
    repeats = {f"base_model.model.{at}.{n}": tensors[f"base_model.{n}"].clone() for at in (0, 1) for n in BASES}
    save_file({**tensors, **repeats}, file)
    (tmp_path / MANIFEST).unlink()
    x = torch.randn(3, 7, dtype=torch.float64)
    expected = model(x)
    assert torch.equal(PeftModel.from_pretrained(model.unload(), tmp_path)(x), expected)


def test_dropout_acts_while_training_only() -> None:
    model = net(randlora_dropout=0.5, init_weights=False)
    x = torch.randn(3, 7, dtype=torch.float64)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r": -1}, "r must be a positive integer; got -1"),
        ({"randlora_dropout": -0.1}, "at least 0 and below 1; got -0.1"),
        ({"bias": "some"}, "'randlora_only'; got 'some'"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RandLoraConfig(**options)
