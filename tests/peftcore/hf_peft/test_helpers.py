import inspect
from typing import Any

import peft
import pytest
import torch
from peftcore.helpers import (
    DoraCaching,
    MontecloraTrainerMixin,
    disable_input_dtype_casting,
    rescale_adapter_scale,
    update_forward_signature,
    update_signature,
)
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftcore
from peftcore import ConfigError


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))


def test_scaling_is_multiplied_inside_of_the_context_as_in_peft() -> None:
    options = {"r": 2, "target_modules": ["0"], "init_lora_weights": False}
    ours = peftcore.get_peft_model(base(), peftcore.LoraConfig(**options))
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**options))
    peft.set_peft_model_state_dict(theirs, peftcore.get_peft_model_state_dict(ours))
    x = torch.randn(2, 4)
    outside = ours(x)
    with rescale_adapter_scale(ours, 0.5), peft.helpers.rescale_adapter_scale(theirs, 0.5):
        torch.testing.assert_close(ours(x), theirs(x))
        assert not torch.allclose(ours(x), outside)
    assert torch.equal(ours(x), outside)


def test_the_scaling_comes_back_after_an_error() -> None:
    model = peftcore.get_peft_model(base(), peftcore.LoraConfig(r=2, lora_alpha=8, target_modules=["0"]))
    with pytest.raises(KeyError), rescale_adapter_scale(model, 3):
        raise KeyError
    assert model[0].scaling["default"] == 4


def test_what_cannot_be_rescaled() -> None:
    with pytest.raises(ConfigError, match="no adapter of this model has a scaling"), rescale_adapter_scale(base(), 1):
        pass
    model = peftcore.get_peft_model(base(), peftcore.LoraConfig(target_modules=["0"]))
    with pytest.raises(TypeError, match="must be a number"), rescale_adapter_scale(model, "1"):  # type: ignore[arg-type]
        pass


def test_contexts_that_have_nothing_to_change() -> None:
    model = peftcore.get_peft_model(base(), peftcore.LoraConfig(target_modules=["0"], use_dora=True))
    x = torch.randn(2, 4)
    y = model(x)
    with disable_input_dtype_casting(model), DoraCaching():
        assert torch.equal(model(x), y)
    DoraCaching()(enabled=True)
    for call in (DoraCaching, DoraCaching()):
        with pytest.warns(UserWarning, match="always kept until a weight changes"):
            call(enabled=False)
    with disable_input_dtype_casting(model[0]):  # diffusers calls it for one layer
        assert torch.equal(model(x), y)


def test_signatures_are_those_of_the_base_already() -> None:
    model = peftcore.get_peft_model(base(), peftcore.LoraConfig(target_modules=["0"]))
    update_forward_signature(model)
    decoder = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    names = [list(inspect.signature(getattr(decoder, method)).parameters) for method in ("forward", "generate")]
    decoder = peftcore.get_peft_model(decoder, peftcore.LoraConfig())
    update_signature(decoder)
    assert names == [list(inspect.signature(getattr(decoder, method)).parameters) for method in ("forward", "generate")]
    with pytest.raises(ValueError, match="'forward', 'generate' or 'all'"):
        update_signature(model, "backward")


def test_the_mixin_adds_the_regulariser_of_monteclora_to_a_trainers_loss() -> None:
    class Losses:
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
            loss = model(inputs).square().mean()
            return (loss, "outputs") if return_outputs else loss

    class Both(MontecloraTrainerMixin, Losses):
        pass

    samples = {"num_samples": 2, "buffer_size": 3, "kl_loss_weight": 1.0}
    config = peftcore.LoraConfig(r=2, target_modules=["0"], monteclora_config=samples)
    model: Any = peftcore.get_peft_model(nn.Sequential(nn.Linear(3, 2)), config)
    x = torch.randn(2, 3)
    plain = Losses().compute_loss(model, x)
    loss = Both().compute_loss(model, x)
    torch.testing.assert_close(loss, plain + model._get_monteclora_loss())
    assert Both().compute_loss(model, x, return_outputs=True)[1] == "outputs"
    other: Any = nn.Linear(3, 2)
    assert torch.equal(Both().compute_loss(other, x), Losses().compute_loss(other, x))
