"""The check that a merged adapter computes the same in its model, loaded by us, and loaded by HF PEFT."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from peftcore import PeftModel
from peftcore.merging import Recipe

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the oracle warns on import
    import peft

TOKENS = torch.arange(1, 25).view(2, 12)
SUM = Recipe.task_arithmetic()


def same_everywhere(model: Any, base: Any, folder: Path) -> Any:
    """Assert that the adapter "m" computes the same in all three; return its saved configuration."""
    model.save_pretrained(folder, selected_adapters=["m"])
    model.set_adapter("m")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        expected = model.eval()(TOKENS).logits
        here = PeftModel.from_pretrained(copy.deepcopy(base), folder / "m").eval()(TOKENS).logits
        there = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "m").eval()(TOKENS).logits
        assert torch.equal(here, expected)
        assert torch.allclose(there, expected, atol=1e-10)
        assert (expected - base(TOKENS).logits).abs().max() > 1e-2
    return json.loads((folder / "m" / "adapter_config.json").read_text())
