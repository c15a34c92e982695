"""What the PVeRA paper says: VeRA with a normal inner activation, of which merging adds the mean."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from method_example import Example, randomise
from safetensors.torch import load_file
from torch import Tensor, nn

from peftcore import CheckpointError, ConfigError, PeftModel, VeraConfig, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.pvera import PveraConfig

EXAMPLE = Example(
    PveraConfig,
    options={"r": 5, "d_initial": 0.4},
    theirs="PveraConfig",
    parity={
        "plain": {"r": 8},
        "drawn again": {"r": 8, "save_projection": False, "projection_prng_key": 42},
        "biases": {"r": 3, "bias": "pvera_only", "init_weights": False},
    },
    spread=1.0,
)
X = torch.linspace(-1, 1, 21, dtype=torch.float64).view(3, 7)


def net(**options: Any) -> Any:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(7, 12), nn.Linear(12, 5)).double()
    model = get_peft_model(plain, PveraConfig(**{"r": 4, "target_modules": ["0", "1"], **options}))
    randomise(model, 0.5)
    return model


def layers(model: Any) -> list[Any]:
    return list(adapter_set(model).adapters("default").values())


def distribution(layer: Any) -> tuple[Tensor, Tensor]:
    """Mean and variance of the first layer's output for X, by the paper's formula."""
    adapter, base = layer.adapters["default"], layer.base_layer
    a, b = adapter.shared.pvera_A[:, :7], adapter.shared.pvera_B[:12]
    mean, log_variance = (X @ a.T * adapter.pvera_lambda_d).chunk(2, -1)
    up = adapter.pvera_lambda_b[:, None] * b
    return base(X) + mean @ up.T, log_variance.exp() @ up.square().T


def test_evaluation_takes_the_mean_and_training_draws_from_the_distribution() -> None:
    layer = net()[0]
    mean, variance = distribution(layer)
    torch.testing.assert_close(layer.eval()(X), mean, rtol=1e-12, atol=1e-12)
    drawn = layer.train()(X.expand(20_000, 3, 7)).detach()
    spread = variance.sqrt()
    assert ((drawn.mean(0) - mean).abs() < 0.05 * spread).all()
    assert (drawn.std(0) / spread - 1).abs().max() < 0.05


def test_the_merged_weight_is_the_mean_whatever_the_mode() -> None:
    for model in (net().eval(), net().train(), net(sample_at_inference=True).eval()):
        mean, _ = distribution(model[0])
        model.merge_adapter()
        torch.testing.assert_close(model[0](X), mean, rtol=1e-12, atol=1e-12)


def test_its_mean_is_vera() -> None:
    model = net().eval()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(7, 12), nn.Linear(12, 5)).double()
    other = get_peft_model(plain, VeraConfig(r=4, target_modules=["0", "1"]))
    for own, vera in zip(layers(model), layers(other), strict=True):
        vera.shared.vera_A.data, vera.shared.vera_B.data = own.shared.pvera_A[:4], own.shared.pvera_B
        vera.vera_lambda_b.data, vera.vera_lambda_d.data = own.pvera_lambda_b.data, own.pvera_lambda_d.data[:4]
    torch.testing.assert_close(model(X), other(X), rtol=1e-12, atol=1e-12)


def test_layers_share_one_frozen_pair_and_train_two_vectors_each() -> None:
    model = net()
    first, second = layers(model)
    assert first.shared is second.shared
    assert first.shared.pvera_A.shape == (8, 12) and first.shared.pvera_B.shape == (12, 4)
    assert model.get_nb_trainable_parameters()[0] == (8 + 12) + (8 + 5)
    before = first.shared.pvera_A.clone()
    model(X).square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    assert torch.equal(first.shared.pvera_A, before)


def test_evaluation_draws_if_asked() -> None:
    plain, drawing = net().eval(), net(sample_at_inference=True).eval()
    assert torch.equal(plain(X), plain(X))
    assert not torch.equal(drawing(X), drawing(X))


def test_a_seed_gives_each_layer_its_own_generator() -> None:
    model, same = (net(generator_seed=5).train() for _ in range(2))
    torch.manual_seed(1)
    first, second = model(X), model(X)
    torch.manual_seed(2)
    assert not torch.equal(first, second)
    assert torch.equal(same(X), first) and torch.equal(same(X), second)
    assert torch.initial_seed() == 2 and torch.equal(torch.rand(1), torch.manual_seed(2) and torch.rand(1))


def test_a_copy_goes_on_drawing_where_the_original_is() -> None:
    model = net(generator_seed=5).train()
    model(X)
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    expected = model(X)
    assert all(torch.equal(twin(X), expected) for twin in twins)


@pytest.mark.filterwarnings("ignore:Specified to not save")
@pytest.mark.parametrize("save", [True, False])
def test_a_directory_with_and_without_projections(save: bool, tmp_path: Path) -> None:
    model = net(save_projection=save, projection_prng_key=11).eval()
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert ({"base_model.pvera_A", "base_model.pvera_B"} <= keys) == save
    expected = model(X)
    assert torch.equal(PeftModel.from_pretrained(model.unload(), tmp_path)(X), expected)


@pytest.mark.filterwarnings("ignore:Specified to not save")
def test_missing_projections_are_an_error(tmp_path: Path) -> None:
    model = net(save_projection=False)
    model.save_pretrained(tmp_path)
    config = PveraConfig(r=4, target_modules=["0", "1"], save_projection=True)
    with pytest.raises(CheckpointError, match=r"missing base_model\.pvera_A"):
        PeftModel.from_pretrained(model.unload(), tmp_path, config=config)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r": 0}, "r must be a positive integer; got 0"),
        ({"pvera_dropout": 1.0}, "below 1; got 1.0"),
        ({"bias": "lora_only"}, "'pvera_only'; got 'lora_only'"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PveraConfig(**options)
