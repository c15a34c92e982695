"""Conversion of a directory of AdaLoRA to plain LoRA, without the model and bit for bit.

ΔW = s·P Λ Q is LoRA's s·BA with A = ΛQ and B = P. AdaLoRA's own forward pass computes ΛQ first too, so the conversion
adds no rounding.

Shapes: i in_features, o out_features, r rank; lora_A (r, i), lora_E (r, 1), lora_B (o, r).
"""

from pathlib import Path

from peftcore.config import PeftConfig
from peftcore.conversion.convert import write_lora
from peftcore.conversion.lora import lora_config, lora_tensors
from peftcore.errors import ConfigError
from peftcore.files.tensors import PREFIX, read_tensors


def convert_directory_to_lora(source: str | Path, directory: str | Path) -> None:
    """Write the AdaLoRA adapter of one directory into another directory as plain LoRA.

    Args:
        source: an AdaLoRA directory, written by peftcore or by HF PEFT.
        directory: where to write the LoRA; an existing directory is replaced.

    Raises:
        CheckpointError: the source is damaged.
        ConfigError: the source holds another method, or every layer has rank 0.
    """
    config = PeftConfig.from_pretrained(source)
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in read_tensors(Path(source)).items()}
    layers = config.take_factors(tensors)
    if layers is None:
        raise ConfigError(
            f"{source} holds a {config.method} adapter; only ADALORA is converted to LORA without its model: load "
            "it onto the model and use save_as_lora"
        )
    rest = {f"{PREFIX}{key}": tensor for key, tensor in tensors.items()}
    write_lora(lora_config(config, layers), lora_tensors(layers, {}) | rest, Path(directory))
