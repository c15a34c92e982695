"""P-tuning: virtual tokens computed by an encoder, which only training needs."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from prompt_models import FAMILIES, attach, both_ways, build, call
from torch import nn

import peftcore
from peftcore import PeftModel, get_peft_model
from peftcore.errors import CheckpointError, ConfigError
from peftcore.prompts.p_tuning import PromptEncoderConfig

KINDS: dict[str, dict[str, Any]] = {
    "MLP": {},
    "MLP of another size": {"encoder_hidden_size": 12},
    "LSTM": {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 8},
    "deep LSTM": {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 3, "encoder_dropout": 0.1},
}


@pytest.mark.filterwarnings("ignore")  # the oracle's own
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert-cls", "t5"])
def test_parity(family: str, kind: str, tmp_path: Path) -> None:
    options = {"num_virtual_tokens": 3, "task_type": FAMILIES[family][1], **KINDS[kind]}
    both_ways(family, peft.PromptEncoderConfig(**options), PromptEncoderConfig(**options), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_is_what_the_paper_says(kind: str) -> None:
    model = attach("llama", PromptEncoderConfig(num_virtual_tokens=4, **KINDS[kind])).double()
    learner = model.prompt_encoder["default"]
    x = learner.vectors
    if learner.lstm_head is not None:
        x = learner.lstm_head(x)[0]  # both directions side by side
        assert x.shape == (4, 2 * learner.config.encoder_hidden_size)
    layers = [layer for layer in learner.mlp_head if isinstance(layer, nn.Linear)]
    assert len(layers) == (3 if learner.lstm_head is None else 2)
    for number, layer in enumerate(layers):
        x = x @ layer.weight.T + layer.bias
        x = x if number == len(layers) - 1 else x.clamp(min=0)
    torch.testing.assert_close(learner.encoded(), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_directory_holds_the_encoder_beside_the_prompt(kind: str, tmp_path: Path) -> None:
    model = attach("llama", PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", **KINDS[kind]))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    ours, theirs = (m.prompt_encoder["default"].state_dict() for m in (model, again))
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert all(p.requires_grad for p in again.prompt_encoder["default"].parameters())


def test_without_its_encoder_a_prompt_can_be_read_and_saved_but_not_trained(tmp_path: Path) -> None:
    model = attach("llama", PromptEncoderConfig(num_virtual_tokens=3))
    model.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "prompt_encoder.safetensors").unlink()
    (tmp_path / "whole" / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match="training cannot continue"):
        PeftModel.from_pretrained(build("llama"), tmp_path / "whole", is_trainable=True)
    folded = PeftModel.from_pretrained(build("llama"), tmp_path / "whole")
    torch.testing.assert_close(call("llama", folded), call("llama", model), rtol=0, atol=1e-6)
    folded.save_pretrained(tmp_path / "folded")
    assert not (tmp_path / "folded" / "prompt_encoder.safetensors").exists()
    again = PeftModel.from_pretrained(build("llama"), tmp_path / "folded")
    torch.testing.assert_close(call("llama", again), call("llama", model), rtol=0, atol=1e-6)


def test_an_encoder_of_another_prompt_is_refused(tmp_path: Path) -> None:
    for number, kind in enumerate(("MLP", "MLP", "LSTM")):
        torch.manual_seed(number)
        config = PromptEncoderConfig(num_virtual_tokens=3, **KINDS[kind])
        attach("llama", config, spread=number).save_pretrained(tmp_path / str(number))
        (tmp_path / str(number) / "SHA256SUMS").unlink()
    for other, words in (("1", "computes another prompt than"), ("2", "does not fit this PTuning configuration")):
        (tmp_path / other / "prompt_encoder.safetensors").replace(tmp_path / "0" / "prompt_encoder.safetensors")
        with pytest.raises(CheckpointError, match=words):
            PeftModel.from_pretrained(build("llama"), tmp_path / "0")
    (tmp_path / "0" / "prompt_encoder.safetensors").unlink()  # as the message says
    PeftModel.from_pretrained(build("llama"), tmp_path / "0")


def test_saving_another_adapter_over_it_takes_the_encoder_away(tmp_path: Path) -> None:
    from peftcore import LoraConfig

    attach("llama", PromptEncoderConfig(num_virtual_tokens=3)).save_pretrained(tmp_path)
    assert (tmp_path / "prompt_encoder.safetensors").exists()
    get_peft_model(build("llama"), LoraConfig()).save_pretrained(tmp_path)
    assert not (tmp_path / "prompt_encoder.safetensors").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"encoder_reparameterization_type": "GRU"}, "must be one of 'MLP', 'LSTM'"),
        ({"encoder_hidden_size": 0}, "encoder_hidden_size must be a positive integer"),
        ({"encoder_dropout": 1.0}, "encoder_dropout must be"),
    ],
)
def test_configurations_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PromptEncoderConfig(num_virtual_tokens=2, **options)


@pytest.mark.filterwarnings("ignore")  # the oracle's own
@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_the_encoder_has_the_attributes_of_hf_peft(kind: str) -> None:
    options: Any = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, "encoder_hidden_size": 5}
    options["encoder_reparameterization_type"] = kind
    encoders = [
        lib.get_peft_model(build("llama"), lib.PromptEncoderConfig(**options)).prompt_encoder["default"]
        for lib in (peftcore, peft)
    ]
    for name in ("encoder_type", "token_dim", "input_size", "hidden_size", "output_size", "total_virtual_tokens"):
        ours, theirs = (getattr(encoder, name) for encoder in encoders)
        assert ours == theirs, name
