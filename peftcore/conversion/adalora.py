"""A directory of AdaLoRA as one of plain LoRA, without the model, to the bit.

ΔW = s·P Λ Q is LoRA's s·BA with A = ΛQ and B = P: AdaLoRA's own forward multiplies these two first, so nothing is
rounded that it does not round.

Shapes: i in_features, o out_features, r rank; lora_A (r, i), lora_E (r, 1), lora_B (o, r).
"""

from pathlib import Path

from peftcore._util.tensors import PREFIX, read_tensors
from peftcore.config import PeftConfig
from peftcore.conversion.convert import write_lora
from peftcore.conversion.factors import Factors
from peftcore.conversion.lora import lora_config, lora_tensors
from peftcore.errors import ConfigError


def convert_directory_to_lora(source: str | Path, directory: str | Path) -> None:
    """Write the AdaLoRA adapter of one directory, HF PEFT's or ours, into another as plain LoRA.

    What was at `directory` is replaced. Raises CheckpointError for a damaged source, ConfigError for another method
    or where no layer has a triplet left.
    """
    config = PeftConfig.from_pretrained(source)
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in read_tensors(Path(source)).items()}
    layers = config.take_factors(tensors)
    if layers is None:
        raise ConfigError(
            f"{source} holds a {config.peft_type} adapter; only ADALORA is converted to LORA without its model: load "
            "it onto the model and use save_as_lora"
        )
    flat = {path: Factors(own.a[0], own.b[0], own.scaling) for path, own in layers.items()}
    rest = {f"{PREFIX}{key}": tensor for key, tensor in tensors.items()}
    write_lora(lora_config(config, flat), lora_tensors(flat, {}) | rest, Path(directory))
