"""MonteCLoRA: noise in training only, with the numbers of HF PEFT for one seed, and its regulariser."""

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lora_nets import adapter
from method_example import randomise
from torch import Tensor, nn

from peftcore import ConfigError, LoraConfig, MontecloraConfig, PeftModel, get_peft_model

pytestmark = pytest.mark.filterwarnings("ignore")  # the oracle warns about its own deprecated calls
OPTIONS: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": ["0"]}
SAMPLES: dict[str, Any] = {"num_samples": 3, "buffer_size": 2, "sample_scaler": 0.3, "kl_loss_weight": 0.1}


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8))


def inputs() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 5, 12)


def monteclora(**options: Any) -> Any:
    torch.manual_seed(3)
    samples = MontecloraConfig(**{**SAMPLES, **options.pop("samples", {})})
    return get_peft_model(net(), LoraConfig(**OPTIONS, **options, monteclora_config=samples))


def test_outside_of_training_it_is_plain_lora() -> None:
    model, x = monteclora(), inputs()
    randomise(model, 0.3)
    part = adapter(model)
    plain = x @ (net()[0].weight + part.scaling * part.lora_B_weight @ part.lora_A_weight).T + net()[0].bias
    torch.testing.assert_close(model.eval()(x), plain)
    model.train()
    assert not torch.allclose(model(x), plain, atol=1e-3) and not torch.equal(model(x), model(x))
    torch.testing.assert_close(model.merge_and_unload()(x), plain)


@pytest.mark.parametrize("bias", [False, True])
def test_the_noise_is_that_of_its_sample(bias: bool) -> None:
    model, x = monteclora(lora_bias=bias), inputs()
    randomise(model, 0.3)
    part = adapter(model)
    sampler = part.lora_monteclora_sampler
    sample = sampler.drawn[-1]
    got = model(x)
    variance = (sampler.std_prior.exp() ** 2 * sample.wishart).clamp_min(1e-3)
    noise = [0.3 * (z @ torch.diag(variance.sqrt())).T for z in sample.normal]
    a = part.lora_A_weight + sum(w * one for w, one in zip(sampler.expert_weights, noise, strict=True))
    shift = net()[0].bias + (part.scaling * part.lora_bias if bias else 0)
    torch.testing.assert_close(got, x @ (net()[0].weight + part.scaling * part.lora_B_weight @ a).T + shift)
    torch.testing.assert_close(sampler.gaussian_var_prior, torch.diag(variance))
    torch.testing.assert_close(sampler.expert_weights.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("use_entropy", [True, False])
def test_training_is_pefts_number_for_number(use_entropy: bool) -> None:
    torch.manual_seed(3)
    samples = peft.tuners.lora.MontecloraConfig(**SAMPLES, use_entropy=use_entropy)
    theirs: Any = peft.get_peft_model(net(), peft.LoraConfig(**OPTIONS, monteclora_config=samples))
    following = torch.rand(1)
    ours = monteclora(samples={"use_entropy": use_entropy})
    assert torch.equal(torch.rand(1), following)
    x = inputs()
    for model in (ours, theirs):
        torch.manual_seed(4)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):  # more forward passes than the buffer has samples
            optimizer.zero_grad()
            (model(x).square().mean() + model._get_monteclora_loss()).backward()
            optimizer.step()
    layer, part = theirs.base_model.model[0], adapter(ours)
    there = layer.lora_monteclora_sampler["default"]
    for name in ("std_prior", "expert_weights_prior", "gaussian_var_prior", "expert_weights"):
        torch.testing.assert_close(getattr(part.lora_monteclora_sampler, name), getattr(there, name))
    torch.testing.assert_close(part.lora_A_weight, layer.lora_A["default"].weight)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours._get_monteclora_loss(), theirs._get_monteclora_loss())
    assert ours.eval()._get_monteclora_loss() == theirs.eval()._get_monteclora_loss() == 0
    torch.testing.assert_close(ours(x), theirs(x))


def test_files_are_pefts(tmp_path: Path) -> None:
    samples = peft.tuners.lora.MontecloraConfig(**SAMPLES)
    theirs: Any = peft.get_peft_model(net(), peft.LoraConfig(**OPTIONS, monteclora_config=samples))
    randomise(theirs, 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, x = PeftModel.from_pretrained(net(), tmp_path / "theirs"), inputs()
    torch.testing.assert_close(ours(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)
    assert not adapter(ours).lora_monteclora_sampler.drawn  # no memory for numbers that only training needs
    ours.save_pretrained(tmp_path / "ours")
    again: Any = peft.PeftModel.from_pretrained(net(), tmp_path / "ours")
    there = again.base_model.model[0].lora_monteclora_sampler["default"]
    assert torch.equal(there.std_prior, adapter(ours).lora_monteclora_sampler.std_prior)
    torch.testing.assert_close(again.eval()(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["num_samples", "dirichlet_prior", "buffer_size"])
def test_numbers_that_must_be_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"MontecloraConfig: `{name}` must be greater than 0; got 0")):
        MontecloraConfig(**{name: 0})
