"""Names of HF PEFT whose method peftcore does not have yet: they can be imported, and refuse to be used."""

from collections.abc import Callable
from typing import Any

from peftcore.errors import ConfigError


class _Unsupported:
    """A class of HF PEFT that refuses to be made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ConfigError(
            f"{type(self).__name__}: peftcore does not have this method of HF PEFT yet; docs/methods.md lists the "
            "methods that it has"
        )


def _refused(function: str, reason: str) -> Callable[..., Any]:
    """Return a function that raises ConfigError with the reason why peftcore does not have it."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ConfigError(f"{function}: {reason}")

    refuse.__name__ = refuse.__qualname__ = function
    refuse.__doc__ = f"Raise ConfigError: {reason}."
    return refuse


bloom_model_postprocess_past_key_value = _refused(
    "bloom_model_postprocess_past_key_value", "prefixes go through transformers' own caches, for Bloom too"
)
find_kappa_target_modules = _refused(
    "find_kappa_target_modules", "peftcore does not choose targets by condition numbers; name target_modules"
)
get_eva_state_dict = _refused(
    "get_eva_state_dict", "call initialize_from_data(model, batches), then save the adapter with its start"
)

TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Any] = {}
"""Empty: no architecture needs its prefixes converted, because they go through transformers' own caches."""
