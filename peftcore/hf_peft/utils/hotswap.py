"""`peft.utils.hotswap`: exchange of a loaded LoRA for a saved one."""

from typing import Any

from peftcore.hf_peft.reexports import reexported
from peftcore.registry import PeftType
from peftcore.storage.hotswap import (
    SAME_OPTIONS,
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)

CONFIG_KEYS_TO_CHECK = {PeftType.LORA: list(SAME_OPTIONS)}
"""{method whose adapters can be exchanged: options that both configurations must agree on}"""

__all__ = [
    "check_hotswap_configs_compatible",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "prepare_model_for_compiled_hotswap",
]


def __getattr__(name: str) -> Any:
    return reexported(__name__, name)
