"""AdaLoRA as plain LoRA: the same function, in a directory that every reader of LoRA takes.

ΔW = s·P Λ Q is LoRA's s·BA with A = ΛQ and B = P: AdaLoRA's own forward multiplies these two first, so nothing is
rounded that it does not round. Each layer keeps its rank (`rank_pattern`) and its scaling s = α/init_r
(`alpha_pattern`, α_layer = s·r); layers whose rank fell to 0 are no targets.

Shapes: i in_features, o out_features, r rank; lora_A (r, i), lora_E (r, 1), lora_B (o, r).
"""

import re
import tempfile
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from peftcore.checkpoint import save_adapter
from peftcore.config import CONFIG_NAME, PeftConfig
from peftcore.errors import ConfigError
from peftcore.files import directory_written_atomically, write_manifest
from peftcore.methods.adalora import AdaLoraConfig, scaling_of
from peftcore.methods.lora import LoraConfig
from peftcore.tensors import PREFIX, WEIGHTS_NAME, read_tensors


def save_as_lora(model: nn.Module, directory: str | Path, adapter_name: str = "default") -> None:
    """Write a model's AdaLoRA adapter as plain LoRA; the adapter itself stays as it is.

    Triplets that the budget does not keep are left out. Raises ConfigError for another method, or where no layer has
    a triplet left.
    """
    with tempfile.TemporaryDirectory() as scratch:
        save_adapter(model, adapter_name, Path(scratch))
        convert_to_lora(scratch, directory)


def convert_to_lora(source: str | Path, directory: str | Path) -> None:
    """Write the AdaLoRA adapter of one directory, HF PEFT's or ours, into another as plain LoRA.

    What was at `directory` is replaced. Raises CheckpointError for a damaged source, ConfigError as `save_as_lora`.
    """
    config = PeftConfig.from_pretrained(source)
    if not isinstance(config, AdaLoraConfig):
        raise ConfigError(f"{source} holds a {config.peft_type} adapter; only ADALORA is converted to LORA")
    tensors = read_tensors(Path(source))
    paths = [key.removeprefix(PREFIX).removesuffix(".lora_E") for key in tensors if key.endswith(".lora_E")]
    ranks = {path: len(tensors[f"{PREFIX}{path}.lora_E"]) for path in paths}
    converted = _lora_config(config, ranks)
    with directory_written_atomically(Path(directory)) as fresh:
        save_file(_lora_tensors(tensors, ranks), fresh / WEIGHTS_NAME, metadata={"format": "pt"})
        (fresh / CONFIG_NAME).write_text(converted.to_json())
        write_manifest(fresh)


def _lora_config(config: AdaLoraConfig, ranks: dict[str, int]) -> LoraConfig:
    kept = {path: rank for path, rank in ranks.items() if rank}
    if not kept:
        raise ConfigError(
            "every layer of this AdaLoRA adapter has rank 0, so no LoRA equals it; there is nothing to save"
        )
    if config.bias == "lora_only" and len(kept) < len(ranks):
        raise ConfigError(
            "bias='lora_only' has trained biases of layers whose rank fell to 0, which a LoRA without these layers "
            "cannot hold; merge the adapter instead"
        )
    names = {path: re.escape(path) for path in kept}
    # A name means every path that it ends, so where one path ends another they are written as regular expressions.
    ambiguous = any(other.endswith(f".{path}") for path in kept for other in ranks)
    most, scaling = max(kept.values()), scaling_of(config)
    key = {path: f"^{names[path]}" if ambiguous else path for path in kept}
    return LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
        target_modules="|".join(sorted(names.values())) if ambiguous else sorted(kept),
        modules_to_save=config.modules_to_save,
        r=most,
        lora_alpha=scaling * most,
        lora_dropout=config.lora_dropout,
        bias=config.bias,
        rank_pattern={key[path]: rank for path, rank in kept.items() if rank != most},
        alpha_pattern={key[path]: scaling * rank for path, rank in kept.items() if rank != most},
        fan_in_fan_out=config.fan_in_fan_out,
    )


def _lora_tensors(tensors: dict[str, Tensor], ranks: dict[str, int]) -> dict[str, Tensor]:
    """Factors with Λ in A; modules and biases that were trained whole, as they are."""
    own = {f"{PREFIX}{path}.{name}" for path in ranks for name in ("lora_A", "lora_B", "lora_E")}
    found = {key: tensor for key, tensor in tensors.items() if key not in own}
    for path, rank in ranks.items():
        if rank:
            at = PREFIX + path
            found[f"{at}.lora_A.weight"] = tensors[f"{at}.lora_A"] * tensors[f"{at}.lora_E"]
            found[f"{at}.lora_B.weight"] = tensors[f"{at}.lora_B"].contiguous()
    return found
