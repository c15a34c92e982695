"""What the Uni-LoRA paper says: one vector for all layers, placed by a random projection with orthonormal columns."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from method_example import Example, randomise
from safetensors.torch import load_file, save_file
from torch import nn

from peftcore import CheckpointError, ConfigError, PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from peftcore.files import MANIFEST
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.unilora import UniLoraConfig

EXAMPLE = Example(
    UniLoraConfig,
    options={"r": 3, "theta_d_length": 24},
    starts_at_base=False,
    sized=False,
    spread=1.0,
    theirs="UniLoraConfig",
    parity={
        "plain": {"r": 4, "theta_d_length": 100},
        "indices in the directory": {"r": 2, "theta_d_length": 64, "save_indices": True, "proj_seed": 5},
        "biases": {"r": 4, "bias": "unilora_only"},
    },
)


def net(**options: Any) -> Any:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4)).double()
    defaults = {"r": 3, "theta_d_length": 24, "target_modules": ["0", "1"]}
    model = get_peft_model(plain, UniLoraConfig(**{**defaults, **options}))
    randomise(model, 0.5)
    return model


def layers(model: Any) -> list[Any]:
    return list(adapter_set(model).adapters("default").values())


def all_indices(model: Any) -> torch.Tensor:
    parts = [part.flatten() for one in layers(model) for part in (one.unilora_indices_A, one.unilora_indices_B)]
    return torch.cat(parts)


def test_the_papers_formula() -> None:
    """The flat A and B of all layers are P θ, and P has orthonormal columns."""
    model = net()
    indices = all_indices(model)
    projection = torch.zeros(len(indices), 24, dtype=torch.float64)
    projection[torch.arange(len(indices)), indices] = 1
    projection /= projection.norm(dim=0)
    torch.testing.assert_close(projection.T @ projection, torch.eye(24).double())
    flat = projection @ layers(model)[0].shared.unilora_theta_d
    x = torch.randn(5, 8, dtype=torch.float64)
    expected, place = x, 0
    for host in model:
        o, i = host.base_layer.weight.shape
        a, b = flat[place : place + 3 * i].view(3, i), flat[place + 3 * i : place + 3 * (i + o)].view(o, 3)
        expected = expected @ (host.base_layer.weight + b @ a).T + host.base_layer.bias
        place += 3 * (i + o)
    assert place == len(flat)
    torch.testing.assert_close(model(x), expected, rtol=1e-7, atol=1e-7)  # the scales are float32's, as in PEFT


def test_only_the_vector_trains_whatever_the_layers() -> None:
    model = net()
    first, second = layers(model)
    assert first.shared is second.shared
    assert model.get_nb_trainable_parameters()[0] == 24
    model[1](torch.randn(2, 12, dtype=torch.float64)).square().sum().backward()
    assert first.shared.unilora_theta_d.grad.abs().sum() > 0


@pytest.mark.parametrize("length", [5, 24, 1000])
def test_every_index_occurs_equally_often_up_to_one(length: int) -> None:
    counts = all_indices(net(theta_d_length=length)).bincount(minlength=length)
    assert counts.sum() == 3 * (8 + 12 + 12 + 4) and counts.max() - counts.min() <= 1


def test_the_seed_draws_the_indices_as_in_peft() -> None:
    one, again, other = (all_indices(net(proj_seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(one, again) and not torch.equal(one, other)
    plain = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4))
    config = peft.UniLoraConfig(r=3, theta_d_length=24, proj_seed=3, target_modules=["0", "1"])
    theirs: Any = peft.get_peft_model(plain, config).base_model.model
    assert torch.equal(one[: 3 * 8].view(3, 8), theirs[0].unilora_indices_A["default"])
    assert torch.equal(one[-3 * 4 :].view(4, 3), theirs[1].unilora_indices_B["default"])


def test_a_layer_shows_its_indices_and_scales_as_in_peft() -> None:
    ours: Any = net()[0]
    assert ours.unilora_indices_A["default"].shape == ours.unilora_scales_A["default"].shape == (3, 8)
    assert ours.unilora_indices_B["default"].shape == ours.unilora_scales_B["default"].shape == (12, 3)
    # 108 entries over 24 indices: 4 or 5 times each
    assert set(ours.unilora_scales_A["default"].flatten().tolist()) <= {0.5, torch.tensor(5.0).rsqrt().item()}


def test_equals_the_plain_lora_that_it_is_converted_to() -> None:
    model = net()
    x = torch.randn(5, 8, dtype=torch.float64)
    expected = model(x)
    config, tensors = convert_to_lora(model, rank=3)
    lora = get_peft_model(model.unload(), config)
    set_peft_model_state_dict(lora, tensors)
    torch.testing.assert_close(lora(x), expected, rtol=1e-6, atol=1e-6)


def test_start_values() -> None:
    def start(**options: Any) -> torch.Tensor:
        config = UniLoraConfig(theta_d_length=5000, target_modules=["0"], **options)
        return layers(get_peft_model(nn.Sequential(nn.Linear(8, 8)), config))[0].shared.unilora_theta_d.detach()

    uniform = start(init_theta_d_bound=0.5)
    assert uniform.abs().max() <= 0.5 and abs(uniform.std().item() * 12**0.5 - 1) < 0.05
    assert abs(start(init_weights=False).std().item() - 1) < 0.05


@pytest.mark.parametrize("save", [True, False])
def test_a_directory_with_and_without_indices(save: bool, tmp_path: Path) -> None:
    model = net(save_indices=save, proj_seed=11)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert ("base_model.model.0.unilora_indices_A" in keys) == save and "base_model.unilora_theta_d" in keys
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = model(x)
    assert torch.equal(PeftModel.from_pretrained(model.unload(), tmp_path)(x), expected)


def test_indices_of_a_directory_replace_those_of_the_seed(tmp_path: Path) -> None:
    model = net(save_indices=True)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    (tmp_path / MANIFEST).unlink(missing_ok=True)
    tensors = load_file(file)
    key = "base_model.model.1.unilora_indices_B"
    save_file(tensors | {key: torch.zeros(4, 3, dtype=torch.long)}, file)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert not layers(loaded)[1].unilora_indices_B.any()
    save_file(tensors | {key: torch.full((4, 3), 24)}, file)
    with pytest.raises(CheckpointError, match="must be below theta_d_length=24; got 24 to 24"):
        PeftModel.from_pretrained(model.unload(), tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"theta_d_length": 0}, "theta_d_length must be a positive integer; got 0"),
        ({"init_theta_d_bound": 0.0}, "init_theta_d_bound must be positive; got 0.0"),
        ({"bias": "some"}, "'unilora_only'; got 'some'"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UniLoraConfig(**options)
