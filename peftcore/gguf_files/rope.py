"""Rotary embeddings of GGUF files as transformers' `rope_parameters`.

Llama 3 divides the frequencies by factors that rise smoothly from 1 to `factor`. A GGUF file holds these factors as the
tensor `rope_freqs`, and not the numbers from which they were computed, so those are found again.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftcore.errors import GgufError

FREQUENCIES = "rope_freqs.weight"
_INSTEAD = "AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE) loads the file dequantised"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The values of all published Llama 3 models; only `factor` differs between them."""


def llama3_factors(rope: Mapping[str, Any], size: int) -> Tensor:
    """Return the divisor of each rotary frequency (size/2,) in float32.

    Args:
        rope: Llama 3's `rope_parameters`.
        size: Size of a head.
    """
    frequencies = 1 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).float()


def rope_parameters(
    value: Mapping[str, Any], known: Mapping[str, Any], size: int, factors: Tensor | None, label: str
) -> dict[str, Any]:
    """Return the `rope_parameters` of a file.

    Args:
        value: The file's metadata.
        known: The parameters that transformers has read, with `rope_theta`.
        size: Size of a head.
        factors: The tensor `rope_freqs` (size/2,); None if the file has none.
        label: The file's name, for the error message.

    Raises:
        GgufError: The file scales its rotary embeddings in another way.
    """
    architecture = value["general.architecture"]
    kind = value.get(f"{architecture}.rope.scaling.type", "none")
    rotated = value.get(f"{architecture}.rope.dimension_count", size)
    if rotated != size:
        raise GgufError(
            f"{label} rotates {rotated} of {size} elements of a head; only whole heads are supported. {_INSTEAD}"
        )
    if kind not in ("none", "linear"):
        raise GgufError(
            f"{label} scales its rotary embeddings by {kind!r}; supported: none, linear, llama3. {_INSTEAD}"
        )
    if kind == "linear":
        return {**known, "rope_type": "linear", "factor": value[f"{architecture}.rope.scaling.factor"]}
    if factors is None:
        return dict(known)
    found = {**known, **LLAMA3, "rope_type": "llama3", "factor": round(float(factors.max()), 3)}
    expected = llama3_factors(found, size)
    if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-3):
        raise GgufError(f"{label} holds {FREQUENCIES} other than Llama 3's, which are not supported. {_INSTEAD}")
    return found
