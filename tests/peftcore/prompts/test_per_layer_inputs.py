"""Virtual tokens before a text whose tokens have vectors in every layer (Gemma 3n, Gemma 4)."""

from typing import Any

import pytest
import torch
from method_example import randomise
from tiny_models import tiny

from peftcore import get_peft_model
from peftcore.prompts.prompt_tuning import PromptTuningConfig


def prompted(model_type: str) -> Any:
    torch.manual_seed(0)
    model: Any = tiny(model_type, "cpu").double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("correct_output_scale"):  # zero in a new Gemma 3n, which hides the vectors
            torch.nn.init.ones_(parameter)
    model = get_peft_model(model, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    randomise(model, 0.3)
    return model


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text", "gemma4"])
def test_the_text_keeps_its_vectors(model_type: str) -> None:
    model, text = prompted(model_type), torch.arange(10, 16)[None]
    with torch.no_grad():
        expected = model(text).logits
        out = model(text[:, :4], use_cache=True)
        parts = [out.logits]
        for token in text[0, 4:]:  # later calls are without a prompt, so the model looks their vectors up itself
            out = model(token[None, None], cache=out.cache, use_cache=True)
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-8, atol=1e-8)


def test_images_have_the_vectors_of_padding() -> None:
    model: Any = prompted("gemma4")
    seen: list[torch.Tensor] = []
    decoder = model.get_decoder()
    decoder.embed_tokens_per_layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.config.image_token_id = 12
    with torch.no_grad():
        decoder.config.pad_token_id = 1
        model(torch.arange(10, 14)[None])
    assert seen[0].tolist() == [[1, 1, 1, 10, 11, 1, 13]]
