"""X-LoRA's options under PEFT's names."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftcore.config import PeftConfig, TunerConfig
from peftcore.errors import ConfigError
from peftcore.files import hub


@dataclass
class XLoraConfig(TunerConfig):
    """X-LoRA's options under PEFT's names. The layers are those of the LoRAs; there is no need to name them."""

    hidden_size: int | None = None
    """Size of the model's hidden states (count); needed."""
    adapters: dict[str, str] | None = field(default_factory=dict)
    """{name: directory or hub id of a trained LoRA}; classes are in the order of the names, "2" before "10"."""
    enable_softmax: bool = True
    """Let the weights of a token and layer sum to 1."""
    enable_softmax_topk: bool = False
    """Let the weights sum to 1 among the LoRAs that `top_k_lora` selects."""
    softmax_temperature: float = 1.0
    """The classifier's logits are divided by it before the softmax."""
    layerwise_scalings: bool = False
    """Use separate weights for each layer; False: one set for all layers."""
    top_k_lora: int | None = None
    """LoRAs that act for a token and layer (count); None: all."""
    xlora_depth: int = 1
    """Linear layers of the classifier (count)."""
    xlora_size: int = 2048
    """Hidden size of a classifier of depth 2 or more (count)."""
    xlora_dropout_p: float = 0.2
    """Dropout in a classifier of depth 2 or more."""
    use_trainable_adapters: bool = False
    """Train the LoRAs with the classifier."""
    scaling_pass_value: float = 0.0
    """Every weight in the first pass."""
    global_scaling_weight: float = 1.0
    """Multiplies the output of every LoRA."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive(*(["hidden_size"] if self.hidden_size is not None else []), "xlora_depth", "xlora_size")
        self.probability("xlora_dropout_p")
        if self.softmax_temperature <= 0:
            raise ConfigError(f"XLoraConfig: softmax_temperature must be above 0; got {self.softmax_temperature}")
        self.check_top_k(self.top_k_lora)
        if self.enable_softmax and self.enable_softmax_topk:
            warnings.warn(
                "XLoraConfig: a softmax over a softmax flattens the weights; set enable_softmax=False", stacklevel=3
            )

    def check_top_k(self, value: int | None) -> None:
        """Raise ConfigError if this value of `top_k_lora` does not fit the number of LoRAs."""
        if value is not None and self.adapters and not 1 <= value <= len(self.adapters):
            raise ConfigError(f"XLoraConfig: top_k_lora must be 1 to {len(self.adapters)}; got {value}")

    def check_complete(self) -> None:
        super().check_complete()
        if self.hidden_size is None:
            raise ConfigError("XLoraConfig: hidden_size is needed; give model.config.hidden_size")
        if not self.adapters:
            raise ConfigError("XLoraConfig: adapters is needed; give {name: directory of a trained LoRA}")

    def directories(self) -> list[Path]:
        """Return the LoRAs' directories in the order of their classes; JSON does not keep the order of the names.

        A hub id is downloaded.
        """
        adapters = self.adapters or {}
        order = sorted(adapters, key=int) if all(name.isdecimal() for name in adapters) else sorted(adapters)
        return [hub.adapter_directory(adapters[name]) for name in order]

    def to_dict(self) -> dict[str, Any]:
        own = super().to_dict()
        unknown_to_peft = TunerConfig().to_dict().keys() - PeftConfig().to_dict().keys()
        return {key: value for key, value in own.items() if value is not None or key not in unknown_to_peft}
