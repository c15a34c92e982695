"""X-LoRA: `config.py` the options, `adapter.py` one layer and the two passes, `mixture.py` the shared state.

`experts.py` reads the LoRAs.
"""

from peftcore.methods.xlora.adapter import XLora
from peftcore.methods.xlora.config import XLoraConfig
from peftcore.methods.xlora.mixture import Mixture

__all__ = ["Mixture", "XLora", "XLoraConfig"]
