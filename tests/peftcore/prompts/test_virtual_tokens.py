"""Virtual tokens stand before the text in the model's input."""

import pytest
import torch
from prompt_models import attach, batch, build

from peftcore import get_peft_model
from peftcore.errors import ConfigError
from peftcore.prompts.prompt_tuning import PromptTuningConfig


def test_the_model_reads_the_prompt_then_the_text() -> None:
    model = attach("llama", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    prompt = model.prompt_encoder["default"].vectors
    text = model.get_input_embeddings()(batch())
    with torch.no_grad():
        out = model(batch()).logits
        with model.disable_adapter():
            expected = model(inputs_embeds=torch.cat([prompt.expand(2, 3, 32), text], 1)).logits
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


def test_half_precision_bases_keep_a_float32_prompt() -> None:
    model = get_peft_model(build("llama").bfloat16(), PromptTuningConfig(num_virtual_tokens=3))
    assert model.prompt_encoder["default"].vectors.dtype == torch.float32
    assert model(batch()).logits.dtype == torch.bfloat16


def test_models_that_cannot_have_one() -> None:
    with pytest.raises(ConfigError, match="no token embeddings"):
        get_peft_model(torch.nn.Linear(2, 2), PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(ConfigError, match="token_dim=16, but the model's embeddings have width 32"):
        get_peft_model(build("llama"), PromptTuningConfig(num_virtual_tokens=2, token_dim=16))
