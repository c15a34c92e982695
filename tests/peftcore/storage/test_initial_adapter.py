"""A LoRA trained on a base without its start is saved as a LoRA for the whole base, as by HF PEFT."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peftcore import CheckpointError, ConfigError, IA3Config, LoraConfig, PeftModel, get_peft_model

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6))


def changed(model: Any) -> Any:
    """Change the weights of the adapter as training would."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def residual(tmp_path: Path) -> tuple[nn.Sequential, Path]:
    """The base without a PiSSA start, and the directory of that start: what HF PEFT's own script for PiSSA saves."""
    model: Any = peft.get_peft_model(net(), peft.LoraConfig(r=3, target_modules=["0", "1"], init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "start"))
    return model.unload(), tmp_path / "start"


def test_the_saved_adapter_gives_the_same_output_on_the_whole_base(
    residual: tuple[nn.Sequential, Path], tmp_path: Path
) -> None:
    base, start = residual
    model = changed(PeftModel.from_pretrained(base, start, is_trainable=True))
    expected = model(X)
    model.save_pretrained(tmp_path / "whole", path_initial_model_for_weight_conversion=start)
    torch.testing.assert_close(model(X), expected)
    assert model[0].adapters["default"].start is None
    for library in (PeftModel, peft.PeftModel):
        read: Any = library.from_pretrained(net(), str(tmp_path / "whole"))
        torch.testing.assert_close(read(X), expected, atol=1e-5, rtol=1e-4)
        assert read.peft_config["default"].r == 6 and read.peft_config["default"].init_lora_weights is True


def test_the_start_of_an_adapter_in_bfloat16_is_subtracted_without_rounding(
    residual: tuple[nn.Sequential, Path], tmp_path: Path
) -> None:
    base, start = residual
    model: Any = PeftModel.from_pretrained(base, start, is_trainable=True)
    model[0].lora_A["default"].weight.data = model[0].lora_A["default"].weight.data.bfloat16()
    model[0].lora_B["default"].weight.data = model[0].lora_B["default"].weight.data.bfloat16()
    model.save_pretrained(tmp_path / "whole", path_initial_model_for_weight_conversion=start)
    key = "base_model.model.0.lora_A.weight"
    saved, first = (load_file(path / "adapter_model.safetensors")[key] for path in (tmp_path / "whole", start))
    assert saved[3:].equal(first) and saved[:3].equal(first.bfloat16().float())


def test_an_adapter_that_subtracts_its_start_is_saved_with_it_anyway(tmp_path: Path) -> None:
    model = get_peft_model(net(), LoraConfig(r=3, target_modules=["0"], init_lora_weights="pissa"))
    model.save_pretrained(tmp_path / "start")
    changed(model).save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "start")
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "converted"))
    assert one == other


def test_what_does_not_fit_is_refused(residual: tuple[nn.Sequential, Path], tmp_path: Path) -> None:
    base, start = residual

    def saved(config: Any) -> Any:
        model = get_peft_model(copy.deepcopy(base), config)
        model.save_pretrained(tmp_path / "new", path_initial_model_for_weight_conversion=start)

    with pytest.raises(CheckpointError, match=r"lora_A.weight has the shape \[3, 8\], and \[2, 8\] fits"):
        saved(LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ConfigError, match="a LORA with use_dora is no difference"):
        saved(LoraConfig(r=3, target_modules=["0"], use_dora=True))
    with pytest.raises(ConfigError, match="got IA3 and LORA"):
        saved(IA3Config(target_modules=["0"], feedforward_modules=[]))
    assert not (tmp_path / "new").exists()
