"""What the SHiRA paper says: a sparse update of as many entries as a LoRA has parameters, at fixed places."""

from pathlib import Path
from typing import Any

import pytest
import torch
from method_example import Example, randomise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftcore import ConfigError, PeftModel, get_peft_model
from peftcore.files import MANIFEST
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.shira import ShiraConfig

EXAMPLE = Example(
    ShiraConfig,
    options={"r": 2},
    theirs="ShiraConfig",
    parity={"plain": {"r": 4}, "seeded": {"r": 3, "random_seed": 9, "init_weights": False}},
    spread=1.0,
    families=("llama", "bert", "vit"),  # PEFT's SHiRA knows no Conv1D
)


def net(i: int = 12, o: int = 8, **options: Any) -> Any:
    torch.manual_seed(0)
    config = ShiraConfig(**{"r": 2, "target_modules": ["0"], **options})
    return get_peft_model(nn.Sequential(nn.Linear(i, o)).double(), config)


def shira_at(model: Any) -> Any:
    return adapter_set(model).adapters("default")["0"]


def first_columns(layer: nn.Module, r: int) -> Tensor:
    """A mask of the leftmost entries of each row, r(o + i) in all for 8 × 12."""
    mask = torch.zeros(8, 12)
    mask[:, : r * (8 + 12) // 8] = 1
    return mask


def test_exactly_r_times_o_plus_i_entries_change() -> None:
    model = net()
    weight = model[0].base_layer.weight.clone()
    randomise(model, 0.5)
    assert model.get_nb_trainable_parameters()[0] == 2 * (12 + 8)
    changed = (model.merge_and_unload()[0].weight != weight).sum()
    assert int(changed) == 2 * (12 + 8)


def test_the_rank_is_not_bound_by_r() -> None:
    model = net(40, 40, r=2)
    randomise(model, 0.5)
    assert torch.linalg.matrix_rank(shira_at(model).delta_weight()) > 30


def test_the_seed_draws_the_places() -> None:
    places = [shira_at(net(random_seed=seed)).places for seed in (3, 3, 4, None)]
    assert torch.equal(places[0], places[1]) and not torch.equal(places[0], places[2])
    assert len(places[3].unique()) == 40
    assert torch.equal(places[0], torch.randperm(96, generator=torch.Generator().manual_seed(3))[:40].sort().values)


def test_start_values() -> None:
    assert shira_at(net()).shira_weight.abs().max() == 0
    assert abs(shira_at(net(60, 60, r=10, init_weights=False)).shira_weight.std().item() - 1) < 0.1


def test_a_mask_of_ones_own(tmp_path: Path) -> None:
    config = ShiraConfig(r=2, mask_type="left", target_modules=["0"])
    config.mask_fn = first_columns
    model = get_peft_model(nn.Sequential(nn.Linear(12, 8)).double(), config)
    randomise(model, 0.5)
    delta = shira_at(model).delta_weight()
    assert bool((delta[:, :5] != 0).all()) and not delta[:, 5:].any()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(nn.Sequential(nn.Linear(12, 8)).double(), tmp_path)  # without the function
    assert torch.equal(shira_at(loaded).delta_weight(), delta)


def test_places_on_disk_win_over_the_seed_also_as_floats(tmp_path: Path) -> None:
    """PEFT draws without a seed by default, and writes the indices as float32 on Windows."""
    model = net(random_seed=5)
    randomise(model, 0.5)
    delta = shira_at(model).delta_weight()
    model.peft_config["default"].random_seed = 6
    model.save_pretrained(tmp_path)
    file, key = tmp_path / "adapter_model.safetensors", "base_model.model.0.shira_indices"
    for kind in (torch.int32, torch.float32):
        tensors = load_file(file)
        assert tensors[key].shape == (2, 40)
        save_file({**tensors, key: tensors[key].to(kind)}, file)
        (tmp_path / MANIFEST).unlink(missing_ok=True)
        loaded = PeftModel.from_pretrained(nn.Sequential(nn.Linear(12, 8)).double(), tmp_path)
        assert torch.equal(shira_at(loaded).delta_weight(), delta)


def test_without_places_nothing_is_computed_or_saved(tmp_path: Path) -> None:
    model = net(mask_type="left")
    with pytest.raises(ConfigError, match=r"mask_type='left' needs config\.mask_fn"):
        model(torch.randn(3, 12, dtype=torch.float64))
    with pytest.raises(ConfigError, match="mask_fn"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_masks_and_ranks_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="8 x 12 with 40 ones; got 96 ones in"):
        net(mask_fn=lambda layer, r: torch.ones(8, 12))
    with pytest.raises(ConfigError, match="r=5 at 0 asks for 100 entries of a weight of 96; r fits up to 4"):
        net(r=5)
    with pytest.raises(ConfigError, match="r must be a positive integer; got 0"):
        net(r=0)
