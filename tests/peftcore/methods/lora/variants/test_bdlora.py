"""BD-LoRA: blocks on the diagonal, parity with HF PEFT, and what matches which list."""

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lora_nets import adapter
from method_example import randomise
from torch import Tensor, nn

from peftcore import BdLoraConfig, ConfigError, HotswapError, LoraConfig, PeftModel, get_peft_model
from peftcore.storage.hotswap import prepare_model_for_compiled_hotswap

pytestmark = pytest.mark.filterwarnings("ignore")  # the oracle warns about its own deprecated calls
OPTIONS: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["0", "2"]}
BOTH: dict[str, Any] = {"target_modules_bd_a": ["0"], "target_modules_bd_b": ["2"], "nblocks": 2}


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6))


def inputs() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 5, 12)


def bdlora(**options: Any) -> Any:
    return get_peft_model(net(), LoraConfig(**OPTIONS, use_bdlora=BdLoraConfig(**{**BOTH, **options})))


def test_only_the_blocks_train_and_the_factors_are_block_diagonal() -> None:
    model, x = bdlora(), inputs()
    first, last = adapter(model), adapter(model, "2")
    assert first.lora_A_weight.shape == (4, 6) and first.lora_B_weight.shape == (8, 4)
    assert last.lora_A_weight.shape == (4, 8) and last.lora_B_weight.shape == (6, 2)
    randomise(model, 0.3)
    a = torch.zeros(4, 12)
    a[:2, :6], a[2:, 6:] = first.lora_A_weight[:2], first.lora_A_weight[2:]
    b = torch.zeros(6, 4)
    b[:3, :2], b[3:, 2:] = last.lora_B_weight[:3], last.lora_B_weight[3:]
    torch.testing.assert_close(first.delta_weight(), first.scaling * first.lora_B_weight @ a)
    torch.testing.assert_close(last.delta_weight(), last.scaling * b @ last.lora_A_weight)
    hidden = x @ (net()[0].weight + first.delta_weight()).T + net()[0].bias
    adapted = hidden.relu() @ (net()[2].weight + last.delta_weight()).T + net()[2].bias
    torch.testing.assert_close(model(x), adapted)
    torch.testing.assert_close(model.merge_and_unload()(x), adapted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_start_outputs_and_files_are_pefts(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(3)
    theirs: Any = peft.get_peft_model(net().to(dtype), peft.LoraConfig(**OPTIONS, use_bdlora=peft.BdLoraConfig(**BOTH)))
    following = torch.rand(1)
    torch.manual_seed(3)
    ours = get_peft_model(net().to(dtype), LoraConfig(**OPTIONS, use_bdlora=BdLoraConfig(**BOTH)))
    assert torch.equal(torch.rand(1), following)
    for path, layer in (("0", theirs.base_model.model[0]), ("2", theirs.base_model.model[2])):
        assert torch.equal(adapter(ours, path).lora_A_weight, layer.lora_A["default"].weight)
        assert torch.equal(adapter(ours, path).lora_B_weight, layer.lora_B["default"].weight)
    randomise(theirs, 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(net().to(dtype), tmp_path / "theirs")
    assert ours.peft_config["default"].use_bdlora.nblocks == 2
    x, tolerance = inputs().to(dtype), 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(ours(x), theirs(x), rtol=tolerance, atol=tolerance)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(net().to(dtype), tmp_path / "ours")
    assert torch.equal(again(x), theirs(x))


def test_a_target_in_neither_list_gets_plain_lora_if_matching_is_not_strict() -> None:
    model = bdlora(target_modules_bd_b=None, match_strict=False)
    assert adapter(model, "2").lora_A_weight.shape == (4, 8) and adapter(model, "2").lora_B_weight.shape == (6, 4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_modules_bd_b": None}, "2 matches neither A nor B block-diagonal patterns"),
        ({"target_modules_bd_b": ["0"]}, "Found overlapping modules in target_modules_bd lists: ['0']"),
        ({"nblocks": 5}, "12 is not divisible by nblocks=5"),
        ({"nblocks": 0}, "nblocks must be a positive integer; got 0"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        bdlora(**options)


def test_a_start_of_whole_factors_is_refused() -> None:
    with pytest.raises(ConfigError, match="init_lora_weights='olora' computes whole factors"):
        LoraConfig(use_bdlora={}, init_lora_weights="olora")


def test_its_rank_cannot_be_enlarged() -> None:
    with pytest.raises(HotswapError, match="cannot be enlarged"):
        prepare_model_for_compiled_hotswap(bdlora(), target_rank=8)
