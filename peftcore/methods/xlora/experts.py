"""The trained LoRAs that X-LoRA weights, read from their directories."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.bases import BaseWeight
from peftcore.config import PeftConfig
from peftcore.errors import CheckpointError, ConfigError, TargetError
from peftcore.files.tensors import PREFIX, read_tensors
from peftcore.registry import method_of

NOT_PLAIN = (
    "arrow_config",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "modules_to_save",
)
"""Options of a LoRA with effects beyond ΔW x at the layer itself, which cannot be weighted."""


_OF_THE_BASE = ".base_layer.weight"
"""Suffix of a base weight's key; PEFT saves the weights of targeted embeddings."""


def read_lora(directory: Path, bases: Mapping[str, BaseWeight]) -> dict[str, Any]:
    """Return {path: trained LoRA} of one directory."""
    config = PeftConfig.from_pretrained(directory)
    special = [option for option in NOT_PLAIN if getattr(config, option)]
    if config.peft_type != "LORA" or special or config.bias != "none":
        why = ", ".join(special) or (config.method if config.peft_type != "LORA" else "trained biases")
        raise ConfigError(f"XLORA mixes plain LoRAs; {directory} has {why}")
    tensors = read_tensors(directory)
    _check_embeddings(tensors, bases, directory)
    unused = {key for key in tensors if not key.endswith(_OF_THE_BASE)}
    experts: dict[str, Any] = {}
    for path in lora_paths(tensors, directory):
        if path not in bases:
            raise TargetError(
                f"XLORA: {directory} adapts {path}, which target_modules leave out; leave target_modules out"
            )
        with torch.device(bases[path].device):
            expert = method_of(config).adapter(config, bases[path], path)
            if not expert.is_additive:
                raise ConfigError(f"XLORA mixes plain LoRAs; {directory} has {config.beyond_low_rank()}")
            expert.reset_parameters()
        own = {suffix: tensors.get(f"{PREFIX}{path}.{suffix}") for suffix in expert.checkpoint_tensors()}
        wrong = [suffix for suffix, tensor in own.items() if tensor is None or not expert.fits(suffix, tensor)]
        if wrong or expert.start is not None:
            raise CheckpointError(
                f"{directory} does not fit this model at {path}: {(wrong or ['init_lora_weights'])[0]} is absent or of "
                "another shape; give a plain LoRA that was trained on this base"
            )
        with torch.no_grad():
            expert.load_checkpoint_tensors(own)
        unused -= {f"{PREFIX}{path}.{suffix}" for suffix in own}
        experts[path] = expert
    if unused:
        raise CheckpointError(
            f"{directory} holds {min(unused)}, which is no tensor of a plain LoRA; give a plain LoRA that was trained "
            "on this base"
        )
    return experts


def _check_embeddings(tensors: Mapping[str, Tensor], bases: Mapping[str, BaseWeight], directory: Path) -> None:
    """Raise CheckpointError if a directory holds embeddings that differ from the model's."""
    for key, saved in tensors.items():
        path = key.removeprefix(PREFIX).removesuffix(_OF_THE_BASE)
        if not key.endswith(_OF_THE_BASE) or path not in bases:
            continue
        weight = bases[path].read_unmerged()
        own = weight.T if bases[path].kind == "embedding" else weight
        if own.shape != saved.shape or not torch.equal(own, saved.to(own)):
            raise CheckpointError(
                f"{directory} holds embeddings of {path} that differ from the model's; X-LoRA mixes LoRAs of one base; "
                "load that directory's own base, or train the LoRA without resized or changed embeddings"
            )


def lora_paths(tensors: Mapping[str, Tensor], directory: Path) -> dict[str, None]:
    """Return the paths of the layers that a LoRA's tensors adapt, each once."""
    paths = dict.fromkeys(key.removeprefix(PREFIX).split(".lora_")[0] for key in tensors if ".lora_" in key)
    if not paths:
        raise CheckpointError(f"{directory} holds no LoRA; give the directory of a trained one")
    return paths


def frozen(expert: nn.Module) -> nn.Module:
    """Turn the parameters into buffers, so that the expert stays frozen when the adapter is made trainable."""
    for name, parameter in list(expert.named_parameters()):
        delattr(expert, name)
        expert.register_buffer(name, parameter.detach())
    return expert
