"""Methods of HF PEFT that a library replaces to mend HF PEFT, and that need no such mend here."""

from typing import Any

_LIBRARIES = ("axolotl.loaders.adapter", "swift.tuners.peft")
"""Modules whose functions replace methods of HF PEFT.

ms-swift leaves out the output projection of `nn.MultiheadAttention`, reads shapes under DeepSpeed, moves AdaLoRA's
tensors to one device, and applies its option `lora_dtype`, of which `peftcore.as_peft` warns. Axolotl adapts the
linear layer inside of Gemma 4's clipped layers if the targets name the clipped layers, which is an error here.
"""


def is_unneeded(value: Any) -> bool:
    """Return True if a function that a program sets in place of a method of HF PEFT has nothing to do here."""
    return getattr(value, "__module__", None) in _LIBRARIES
