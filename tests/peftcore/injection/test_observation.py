"""Observed runs see the base alone, in eval mode, and leave no hook behind."""

import pytest
import torch
from torch import nn

from peftcore import ConfigError, LoraConfig, get_peft_model
from peftcore.injection.observation import observe
from peftcore.kernels.input_moments import InputMoments


def test_the_base_runs_in_eval_mode_and_no_hook_stays() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4))
    x = torch.randn(8, 4)
    expected = net.eval()[0](x).detach()
    model = get_peft_model(net, LoraConfig(target_modules=["0"], init_lora_weights=False)).train()
    moments, layer = InputMoments("test"), model[2]
    observe(model, moments, {"2": layer}, [{"input": x}], None, progress=False)
    torch.testing.assert_close(moments.pop("2"), expected.T @ expected / 8)
    assert model.training and not layer._forward_hooks
    with pytest.raises(ConfigError, match="test got no batch"):
        observe(model, InputMoments("test"), {"2": layer}, [], None, progress=False)
    broken = [{"input": torch.full((1, 4), torch.nan)}]
    with pytest.raises(ConfigError, match="a batch is a dictionary of the model's arguments"):
        observe(model, InputMoments("test"), {"2": layer}, x, None, progress=False)
    with pytest.raises(ConfigError, match="the input of 2 has values in batch 1"):
        observe(model, InputMoments("test"), {"2": layer}, broken, None, progress=False)
    assert not layer._forward_hooks
