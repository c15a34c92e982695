"""A GGUF LoRA computes in llama.cpp what the adapter computes."""

from functools import partial
from pathlib import Path

import pytest
from gguf_models import FAMILIES, LlamaCpp, adapted, furthest, log_probs, tiny, write_gguf

from peftcore.export import export_gguf_lora

CLOSE = 1e-3
"""Log-probabilities; llama.cpp's GELU is a table of float16, the other families agree to 1e-5."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_says_the_same_in_llama_cpp(family: str, tmp_path: Path) -> None:
    base = write_gguf(tiny(family), tmp_path / "base.gguf")
    model = adapted(family)
    file = export_gguf_lora(model, "default", tmp_path / "lora.gguf")
    there = LlamaCpp(base, file)
    here = partial(log_probs, model)
    assert furthest(there.log_probs, here) < CLOSE
    with model.disable_adapter():
        assert furthest(partial(there.log_probs, scale=0), here) < CLOSE
        assert furthest(there.log_probs, here) > 0.1
