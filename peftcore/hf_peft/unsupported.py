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


class AdamssConfig(_Unsupported):
    """Configuration of ADAMSS."""


class AdamssModel(_Unsupported):
    """Model class of ADAMSS."""


class BeftConfig(_Unsupported):
    """Configuration of BEFT."""


class BeftModel(_Unsupported):
    """Model class of BEFT."""


class LilyConfig(_Unsupported):
    """Configuration of LILY."""


class LilyModel(_Unsupported):
    """Model class of LILY."""


class FrodConfig(_Unsupported):
    """Configuration of FROD."""


class FrodModel(_Unsupported):
    """Model class of FROD."""


class PveraConfig(_Unsupported):
    """Configuration of PVERA."""


class PveraModel(_Unsupported):
    """Model class of PVERA."""


class GloraConfig(_Unsupported):
    """Configuration of GLORA."""


class GloraModel(_Unsupported):
    """Model class of GLORA."""


class UniLoraConfig(_Unsupported):
    """Configuration of UNILORA."""


class UniLoraModel(_Unsupported):
    """Model class of UNILORA."""


class OSFConfig(_Unsupported):
    """Configuration of OSF."""


class OSFModel(_Unsupported):
    """Model class of OSF."""


class CartridgeConfig(_Unsupported):
    """Configuration of CARTRIDGE."""


class CartridgeEncoder(_Unsupported):
    """Model class of CARTRIDGE."""


class TinyLoraConfig(_Unsupported):
    """Configuration of TINYLORA."""


class TinyLoraModel(_Unsupported):
    """Model class of TINYLORA."""


class PsoftConfig(_Unsupported):
    """Configuration of PSOFT."""


class PsoftModel(_Unsupported):
    """Model class of PSOFT."""


class PeanutConfig(_Unsupported):
    """Configuration of PEANUT."""


class PeanutModel(_Unsupported):
    """Model class of PEANUT."""


class ShadowConfig(_Unsupported):
    """Configuration of SHADOW."""


class ShadowModel(_Unsupported):
    """Model class of SHADOW."""


class SupertuningConfig(_Unsupported):
    """Configuration of SUPERTUNING."""


class SupertuningModel(_Unsupported):
    """Model class of SUPERTUNING."""


class DeftConfig(_Unsupported):
    """Configuration of DEFT."""


class DeftModel(_Unsupported):
    """Model class of DEFT."""


class ArrowConfig(_Unsupported):
    """Options of the LoRA variant Arrow."""


def _refused(function: str, reason: str) -> Callable[..., Any]:
    """Return a function that raises ConfigError with the reason why peftcore does not have it."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ConfigError(f"{function}: {reason}")

    refuse.__name__ = refuse.__qualname__ = function
    refuse.__doc__ = f"Raise ConfigError: {reason}."
    return refuse


_NO_CARTRIDGE = "peftcore does not have HF PEFT's method CARTRIDGE yet"
_NO_ARROW = "HF PEFT's Arrow model is not built; route by `peftcore.routing.gates.arrow_gate`"

bloom_model_postprocess_past_key_value = _refused(
    "bloom_model_postprocess_past_key_value", "prefixes go through transformers' own caches, for Bloom too"
)
compose_cartridge_adapters = _refused("compose_cartridge_adapters", _NO_CARTRIDGE)
create_arrow_model = _refused("create_arrow_model", _NO_ARROW)
find_kappa_target_modules = _refused(
    "find_kappa_target_modules", "peftcore does not choose targets by condition numbers; name target_modules"
)
initialize_kv_prefix_from_past_key_values = _refused("initialize_kv_prefix_from_past_key_values", _NO_CARTRIDGE)
initialize_kv_prefix_from_text = _refused("initialize_kv_prefix_from_text", _NO_CARTRIDGE)
get_eva_state_dict = _refused(
    "get_eva_state_dict", "call initialize_from_data(model, batches), then save the adapter with its start"
)
prompt_embeddings_from_past_key_values = _refused("prompt_embeddings_from_past_key_values", _NO_CARTRIDGE)

TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Any] = {}
"""Empty: no architecture needs its prefixes converted, because they go through transformers' own caches."""
