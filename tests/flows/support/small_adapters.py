"""An adapter of a tiny base, as the command line gets it."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from peftcore import get_peft_model


def trained(base: Path, config: Any, directory: Path) -> list[str]:
    """Save an adapter of `base`; returns the options that name the two."""
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(directory)
    return ["--adapter", str(directory), "--base", str(base)]
