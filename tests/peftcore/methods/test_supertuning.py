"""What the Super-Tuning paper says: the entries of the weight that are largest in magnitude train, and no others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from method_example import Example, randomise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftcore import CheckpointError, ConfigError, PeftModel, get_peft_model
from peftcore.files import MANIFEST
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.supertuning import SupertuningConfig

EXAMPLE = Example(
    SupertuningConfig,
    options={"sparsity": 0.75, "r": 2},
    theirs="SupertuningConfig",
    parity={
        "entries": {"sparsity": 0.9},
        "smallest": {"sparsity": 0.5, "select_top": False, "save_precomputed_indices": False},
        "with BA": {"sparsity": 0.95, "r": 4, "lora_alpha": 6.0},
    },
    spread=0.5,
    families=("llama", "bert"),  # PEFT's Super-Tuning knows no Conv1D
)
PLAIN: dict[str, Any] = {"sparsity": 0.75, "target_modules": ["0"]}


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8)).double()


def net(**options: Any) -> Any:
    return get_peft_model(base(), SupertuningConfig(**{**PLAIN, **options}))


def adapter_of(model: Any) -> Any:
    return adapter_set(model).adapters("default")["0"]


@pytest.mark.parametrize("top", [True, False])
def test_a_quarter_of_the_entries_changes_the_largest_or_the_smallest(top: bool) -> None:
    model = net(select_top=top)
    weight = model[0].base_layer.weight.clone()
    assert model.get_nb_trainable_parameters()[0] == 24  # of 96
    randomise(model, 0.5)
    changed = model.merge_and_unload()[0].weight != weight
    inside, outside = weight[changed].abs(), weight[~changed].abs()
    assert len(inside) == 24
    assert inside.min() > outside.max() if top else inside.max() < outside.min()


def test_the_papers_formula() -> None:
    """W' = W + S + α/r BA."""
    model = net(r=2, lora_alpha=6.0)
    randomise(model, 0.5)
    adapter, layer = adapter_of(model), model[0].base_layer
    change = 3 * adapter.supertuning_lora_B @ adapter.supertuning_lora_A
    for place, value in zip(adapter.supertuning_indices.tolist(), adapter.supertuning_values, strict=True):
        change[place // 12, place % 12] += value
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ (layer.weight + change).T + layer.bias, rtol=1e-12, atol=1e-12)


def test_lora_alpha_is_2r_by_default() -> None:
    assert SupertuningConfig(r=3).lora_alpha == 6
    assert adapter_of(net(r=3)).scaling == 2
    config = SupertuningConfig(**PLAIN)
    config.r = 3  # after the configuration was checked
    assert adapter_of(get_peft_model(base(), config)).scaling == 2


def test_dropout_acts_on_the_input_of_ba_alone() -> None:
    x = torch.ones(4, 12, dtype=torch.float64)
    model = net(r=2, lora_dropout=0.5, init_weights=False).train()
    assert not torch.equal(model(x), model(x))
    with torch.no_grad():
        adapter_of(model).supertuning_lora_B.zero_()
    assert torch.equal(model(x), model(x))


def test_dropout_without_ba_is_named() -> None:
    with pytest.warns(UserWarning, match="lora_dropout"):
        net(lora_dropout=0.5)


def test_a_layer_shows_its_indices_and_dropout_as_in_peft() -> None:
    layer: Any = net(r=2, lora_dropout=0.5)[0]
    assert layer.supertuning_indices["default"].shape == layer.supertuning_values["default"].shape == (24,)
    assert layer.supertuning_lora_dropout["default"].p == 0.5
    assert layer.supertuning_lora_A["default"].weight.shape == (2, 12)


@pytest.mark.parametrize("save", [True, False])
def test_a_directory_with_and_without_indices(save: bool, tmp_path: Path) -> None:
    model = net(save_precomputed_indices=save)
    randomise(model, 0.5)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    start = "base_model.model.0.supertuning_"
    assert keys == {f"{start}values", *([f"{start}indices"] if save else [])}
    x = torch.randn(3, 12, dtype=torch.float64)
    expected = model(x)
    assert torch.equal(PeftModel.from_pretrained(model.unload(), tmp_path)(x), expected)


def test_indices_of_a_directory_count_whatever_the_base(tmp_path: Path) -> None:
    model = net()
    randomise(model, 0.5)
    model.save_pretrained(tmp_path)
    torch.manual_seed(9)
    other = nn.Sequential(nn.Linear(12, 8)).double()
    loaded = PeftModel.from_pretrained(other, tmp_path)
    assert torch.equal(adapter_of(loaded).delta_weight(), adapter_of(model).delta_weight())


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    model = net()
    model.save_pretrained(tmp_path)
    (tmp_path / MANIFEST).unlink(missing_ok=True)
    file = tmp_path / "adapter_model.safetensors"
    tensors: dict[str, Tensor] = load_file(file)
    tensors["base_model.model.0.supertuning_indices"][3] = 96
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"below the 96 entries of the weight; got .* to 96"):
        PeftModel.from_pretrained(base(), tmp_path)


def test_a_second_adapter_chooses_by_the_weight_without_merged_changes() -> None:
    model = net()
    randomise(model, 5)
    model.merge_adapter()
    model.add_adapter("second", SupertuningConfig(**PLAIN))
    second: Any = adapter_set(model).adapters("second")["0"]
    assert torch.equal(second.supertuning_indices, adapter_of(model).supertuning_indices)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sparsity": 1.0}, "sparsity must be at least 0 and below 1; got 1.0"),
        ({"r": 0}, "r must be a positive integer; got 0"),
        ({"lora_alpha": 4.0}, "got lora_alpha=4.0 and r=None; give r"),
        ({"r": 2, "lora_dropout": 1.0}, "lora_dropout must be at least 0 and below 1"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SupertuningConfig(**options)


def test_a_sparsity_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"leaves no trainable entries of the 96 at 0; give at most 0\.98"):
        net(sparsity=0.99)
