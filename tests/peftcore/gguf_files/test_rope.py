"""Rotary embeddings of a file are those of the model, or the file is refused."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from peftcore import GgufError
from peftcore.gguf_files.rope import LLAMA3, llama3_factors, rope_parameters

DEFAULT = {"rope_type": "default", "rope_theta": 500000.0}


def metadata(**values: Any) -> dict[str, Any]:
    return {"general.architecture": "llama", **{f"llama.rope.{name}": value for name, value in values.items()}}


@pytest.mark.parametrize("factor", [8.0, 32.0])  # Llama 3.1 and Llama 3.2
def test_llama_3s_numbers_are_found_from_its_factors(factor: float) -> None:
    rope = {**DEFAULT, **LLAMA3, "rope_type": "llama3", "factor": factor}
    config = LlamaConfig(hidden_size=64, num_attention_heads=1, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 500000.0 ** (torch.arange(0, 64, 2) / 64)
    factors = llama3_factors(rope, 64)
    torch.testing.assert_close(plain / factors, scaled)
    assert rope_parameters(metadata(), DEFAULT, 64, factors, "x.gguf") == rope


def test_linear_scaling_is_read_and_none_stays_none() -> None:
    linear = metadata(**{"scaling.type": "linear", "scaling.factor": 4.0, "dimension_count": 64})
    assert rope_parameters(linear, DEFAULT, 64, None, "x.gguf") == {**DEFAULT, "rope_type": "linear", "factor": 4.0}
    assert rope_parameters(metadata(), DEFAULT, 64, None, "x.gguf") == DEFAULT


@pytest.mark.parametrize(
    ("values", "factors", "message"),
    [
        ({"scaling.type": "yarn"}, None, "by 'yarn'; supported: none, linear, llama3"),
        ({"dimension_count": 16}, None, "rotates 16 of 64 elements"),
        ({}, torch.linspace(1, 8, 32), "other than Llama 3's"),
        ({}, torch.full((16,), 8.0), "other than Llama 3's"),
    ],
)
def test_other_rotary_embeddings_are_refused(values: dict[str, Any], factors: Any, message: str) -> None:
    with pytest.raises(GgufError, match=message):
        rope_parameters(metadata(**values), DEFAULT, 64, factors, "x.gguf")
