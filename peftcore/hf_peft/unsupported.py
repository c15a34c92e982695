"""Names of HF PEFT whose method peftcore does not have yet: they can be imported, and refuse to be used."""

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


class BdLoraConfig(_Unsupported):
    """Options of the LoRA variant BdLora."""


class KasaConfig(_Unsupported):
    """Options of the LoRA variant Kasa."""


class MontecloraConfig(_Unsupported):
    """Options of the LoRA variant Monteclora."""


class VeloraConfig(_Unsupported):
    """Options of the LoRA variant Velora."""


class ArrowConfig(_Unsupported):
    """Options of the LoRA variant Arrow."""
