"""What the PSOFT paper says: W's principal part is turned in its own subspace, and the rest of W stays."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from method_example import Example, randomise
from safetensors.torch import load_file
from torch import Tensor, nn

from peftcore import ConfigError, PeftModel, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.psoft import PsoftConfig

EXAMPLE = Example(
    PsoftConfig,
    options={"r": 4},
    layers={"Conv1D": {"psoft_orth": False, "ab_svd_init": "pissa_init"}},
    sized=False,
    theirs="PsoftConfig",
    parity={
        "plain": {"r": 4},
        "series": {"r": 6, "use_cayley_neumann": True, "cayley_neumann_eps": 0.5, "psoft_mag_a": False},
        "free": {"r": 6, "psoft_alpha": 8, "psoft_orth": False, "psoft_mag_b": False, "ab_svd_init": "pissa_init"},
        "approximate vectors": {"r": 4, "psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 2, "random_seed": 3},
    },
    families=("llama", "bert"),  # PEFT's PSOFT knows no Conv1D
)


def net(i: int = 12, o: int = 8, **options: Any) -> Any:
    torch.manual_seed(0)
    config = PsoftConfig(**{"r": 4, "target_modules": ["0"], **options})
    return get_peft_model(nn.Sequential(nn.Linear(i, o)).double(), config)


def psoft_at(model: Any) -> Any:
    return adapter_set(model).adapters("default")["0"]


def principal(weight: Tensor, r: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    u, values, vh = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :r], values[:r].diag(), vh[:r]


@pytest.mark.parametrize("alpha", [4, 10])
@pytest.mark.parametrize("start", ["psoft_init", "pissa_init"])
def test_the_papers_formula(start: str, alpha: int) -> None:
    """W' = W + U Σ (b R a − I) Vᵀ, or with the roots of Σ on both sides of the bracket; s cancels."""
    model = net(ab_svd_init=start, psoft_alpha=alpha)
    randomise(model, 0.4)
    layer, adapter = model[0].base_layer, psoft_at(model)
    u, values, vh = principal(layer.weight)
    skew = torch.zeros(4, 4, dtype=torch.float64)
    above = iter(adapter.psoft_R.weight)
    for row in range(4):
        for column in range(row + 1, 4):
            skew[row, column] = next(above)
    skew = skew - skew.T
    eye = torch.eye(4, dtype=torch.float64)
    rotation = (eye + skew) @ torch.linalg.inv(eye - skew)
    torch.testing.assert_close(rotation @ rotation.T, eye)
    turn = adapter.psoft_R.vector_b.diag() @ rotation @ adapter.psoft_R.vector_a.diag() - eye
    change = u @ values @ turn @ vh if start == "psoft_init" else u @ values.sqrt() @ turn @ values.sqrt() @ vh
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ (layer.weight + change).T + layer.bias, rtol=1e-10, atol=1e-10)


def test_without_the_vectors_the_singular_values_stay() -> None:
    """R is orthogonal on the input's side of Σ, so the outputs' Gram matrix in the subspace stays."""
    model = net(psoft_mag_a=False, psoft_mag_b=False, r=8)
    randomise(model, 0.5)
    weight = model[0].base_layer.weight.clone()
    merged = model.merge_and_unload()[0].weight
    assert not torch.allclose(merged, weight)
    torch.testing.assert_close(merged @ merged.T, weight @ weight.T)


def test_the_rest_of_the_weight_stays() -> None:
    model = net()
    randomise(model, 0.5)
    weight = model[0].base_layer.weight
    u, _, vh = torch.linalg.svd(weight)
    rest = u[:, 4:]
    change = psoft_at(model).delta_weight()
    assert change.norm() > 0.1
    torch.testing.assert_close(rest.T @ change, torch.zeros(4, 12).double())
    torch.testing.assert_close(change @ vh[4:].T, torch.zeros(8, 8).double())


@pytest.mark.parametrize(
    "options, count", [({}, 6 + 4 + 4), ({"psoft_mag_a": False}, 6 + 4), ({"psoft_orth": False}, 16 + 8)]
)
def test_parameters(options: dict[str, Any], count: int) -> None:
    assert net(**options).get_nb_trainable_parameters()[0] == count


@pytest.mark.parametrize("terms", [2, 3, 4, 7])
@pytest.mark.parametrize("eps", [None, 0.3])
def test_the_series_is_pefts(terms: int, eps: float | None) -> None:
    options: dict[str, Any] = {"use_cayley_neumann": True, "num_cayley_neumann_terms": terms, "cayley_neumann_eps": eps}
    model = net(**options)
    randomise(model, 0.2)
    theirs = peft.tuners.psoft.layer.OrthLayer(4, **options).double()
    ours = psoft_at(model).psoft_R
    theirs.load_state_dict(ours.state_dict())
    expected = theirs.get_matrix()
    actual = psoft_at(model)._turn() / psoft_at(model).scaling + torch.eye(4)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_the_bound_of_the_series_keeps_a_large_turn_finite() -> None:
    turns = []
    for eps in (None, 0.5):
        model = net(use_cayley_neumann=True, cayley_neumann_eps=eps)
        randomise(model, 50)
        turns.append(psoft_at(model)._rotation().norm())
    assert turns[0] > 1e5 and turns[1] < 4


def test_a_directory_holds_the_turn_alone(tmp_path: Path) -> None:
    model = net(psoft_svd="lowrank", random_seed=5)
    randomise(model, 0.5)
    model.save_pretrained(tmp_path)
    start = "base_model.model.0.psoft_R."
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == {
        *(f"{start}{name}" for name in ("weight", "vector_a", "vector_b"))
    }
    x = torch.randn(3, 12, dtype=torch.float64)
    expected = model(x)
    torch.manual_seed(8)  # the approximation has a seed of its own
    state = torch.get_rng_state()
    assert torch.equal(PeftModel.from_pretrained(model.unload(), tmp_path)(x), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_seed_decides_the_approximation() -> None:
    one, again, other = (
        psoft_at(net(40, 40, psoft_svd="lowrank", psoft_svd_lowrank_niter=1, random_seed=seed)).psoft_A
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, again) and not torch.allclose(one, other)


def test_a_second_adapter_takes_the_subspace_of_the_weight_without_merged_changes() -> None:
    model = net()
    randomise(model, 0.5)
    model.merge_adapter()
    model.add_adapter("second", PsoftConfig(r=4, target_modules=["0"]))
    second: Any = adapter_set(model).adapters("second")["0"]
    assert torch.equal(second.psoft_A, psoft_at(model).psoft_A)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ab_svd_init": "olora"}, "ab_svd_init must be one of 'psoft_init', 'pissa_init'; got 'olora'"),
        ({"psoft_svd": "qr"}, "psoft_svd must be one of 'full', 'lowrank'; got 'qr'"),
        ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 1}, "must be at least 2"),
        ({"use_cayley_neumann": True, "cayley_neumann_eps": 1.0}, "must be between 0 and 1; got 1.0; try 0.9"),
        ({"psoft_alpha": 0}, "psoft_alpha must be a positive integer; got 0"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PsoftConfig(**options)


@pytest.mark.parametrize(
    "options, setting",
    [
        ({"psoft_svd_lowrank_niter": 4}, "psoft_svd='lowrank'"),
        ({"random_seed": 4}, "psoft_svd='lowrank'"),
        ({"num_cayley_neumann_terms": 4}, "use_cayley_neumann=True"),
        ({"cayley_neumann_eps": 0.4}, "use_cayley_neumann=True"),
    ],
)
def test_options_without_effect_are_named(options: dict[str, Any], setting: str) -> None:
    with pytest.warns(UserWarning, match=f"{next(iter(options))} has no effect without {setting}"):
        PsoftConfig(**options)
