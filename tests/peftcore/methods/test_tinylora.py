"""What the TinyLoRA paper says: a few trained numbers mix fixed random matrices between a weight's singular vectors."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_parity import agrees_with_peft
from method_example import Example, randomise
from safetensors.torch import load_file
from torch import Tensor, nn

from peftcore import ConfigError, PeftModel, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.tinylora import TinyLoraConfig

EXAMPLE = Example(
    TinyLoraConfig,
    options={"r": 2, "u": 5},
    theirs="TinyLoraConfig",
    parity={
        "plain": {"r": 2, "u": 6},
        "tied": {"r": 3, "u": 4, "weight_tying": 0.6},
        "drawn again": {"u": 6, "weight_tying": 1.0, "save_projection": False, "projection_seed": 7},
    },
)


def net(count: int = 1, **options: Any) -> Any:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6) for _ in range(count)]
    return get_peft_model(nn.Sequential(*layers).double(), TinyLoraConfig(target_modules=r"\d+", **options))


def adapters(model: Any) -> list[Any]:
    return list(adapter_set(model).adapters("default").values())


def test_the_papers_formula() -> None:
    model = net(r=3, u=4)
    weight = model[0].weight.detach()
    randomise(model, 0.5)
    (adapter,) = adapters(model)
    u, s, vh = torch.linalg.svd(weight)
    mixed = sum(v * p for v, p in zip(adapter.vector, adapter.tinylora_P, strict=True))
    scales = s[:3].sqrt().diag()
    expected = u[:, :3] @ scales @ mixed @ scales @ vh[:3]
    torch.testing.assert_close(adapter.delta_weight(), expected, rtol=1e-5, atol=1e-6)  # PEFT's SVD is float32's
    x = torch.randn(2, 6, dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ (weight + adapter.delta_weight()).T + model[0].bias)


@pytest.mark.parametrize("tying, groups", [(0.0, "01234"), (0.5, "00111"), (0.6, "00111"), (1.0, "00000")])
def test_successive_layers_share_vectors(tying: float, groups: str) -> None:
    model = net(5, u=3, weight_tying=tying)
    vectors = [id(adapter.vector) for adapter in adapters(model)]
    for one, first in enumerate(groups):
        assert all((vectors[one] == vectors[other]) == (first == second) for other, second in enumerate(groups))
    assert model.get_nb_trainable_parameters()[0] == 3 * len(set(groups))


def test_projections_depend_on_the_seed_and_the_layers_number_alone() -> None:
    one, again, other = (adapters(net(2, u=500, r=4, projection_seed=seed)) for seed in (5, 5, 6))
    assert torch.equal(one[0].tinylora_P, again[0].tinylora_P)
    assert torch.equal(one[1].tinylora_P, other[0].tinylora_P)
    assert not torch.equal(one[0].tinylora_P, one[1].tinylora_P)
    assert abs(one[0].tinylora_P.std() * math.sqrt(4) - 1) < 0.03


def test_a_small_layer_has_no_more_singular_values_than_its_smaller_side() -> None:
    model: Any = get_peft_model(nn.Sequential(nn.Linear(6, 2)), TinyLoraConfig(r=4, target_modules=["0"]))
    assert adapters(model)[0].tinylora_A.shape == (2, 6)


def test_starts() -> None:
    assert adapters(net())[0].vector.abs().max() == 0
    for init in ("uniform", False):
        vector = adapters(net(init_weights=init, init_v_bound=0.5, u=400))[0].vector
        assert 0.4 < vector.abs().max() <= 0.5 and vector.min() < -0.4


def test_parity_on_an_embedding(tmp_path: Path) -> None:
    x = torch.randint(0, 20, (3, 5))
    agrees_with_peft(nn.Embedding(20, 8), x, "TinyLoraConfig", TinyLoraConfig, {"u": 4}, tmp_path, spread=1.0)


def test_a_scaled_embedding_merges() -> None:
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * self.embed_scale

    model: Any = get_peft_model(nn.Sequential(Scaled(20, 8)).double(), TinyLoraConfig(u=4, target_modules=["0"]))
    randomise(model, 1.0)
    x = torch.randint(0, 20, (3, 5))
    adapted = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), adapted, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Specified to not save")
def test_the_directory_holds_what_is_needed(tmp_path: Path) -> None:
    model = net(3, u=3, weight_tying=1.0, save_projection=False, exclude_modules=["1"])
    randomise(model, 0.5)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["target_modules"] == ["0", "2"] and "exclude_modules" not in saved
    keys = {f"base_model.model.{layer}.tinylora_{side}" for layer in (0, 2) for side in "AB"}
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == keys | {"base_model.tinylora_v.0"}
    x = torch.randn(2, 6, dtype=torch.float64)
    expected = model(x)
    assert torch.equal(PeftModel.from_pretrained(model.unload(), tmp_path)(x), expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r": 0}, "r must be a positive integer; got 0"),
        ({"u": 0}, "u must be a positive integer; got 0"),
        ({"weight_tying": 1.5}, "weight_tying must be from 0 to 1; got 1.5"),
        ({"init_weights": "normal"}, "True, False or 'uniform'; got 'normal'"),
        ({"bias": "some"}, "'tinylora_only'; got 'some'"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TinyLoraConfig(**options)
