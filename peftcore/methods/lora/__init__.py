"""LoRA with its variants: `config.py` the options, `adapter.py` the mathematics, `starts.py` where it begins,
`invocation.py` where in a sequence it acts (aLoRA).
"""

from peftcore.methods.lora.adapter import Lora
from peftcore.methods.lora.config import LoraConfig

__all__ = ["Lora", "LoraConfig"]
