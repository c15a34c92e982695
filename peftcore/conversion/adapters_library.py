"""Conversion of a directory of the library `adapters` with Houlsby's bottleneck adapters to a directory of BOTTLENECK.

Its `double_seq_bn` adds U σ(D y + d) + u to the outputs y of attention and MLP, which are outputs of single layers. Its
other bottleneck adapters read the residual stream or have norms of their own, so no BOTTLENECK adapter equals them.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from peftcore.config import LARGEST_CONFIG, parsed_json
from peftcore.detection import detect
from peftcore.errors import CheckpointError, ConfigError
from peftcore.files import CONFIG_NAME, WEIGHTS_NAME, directory_written_atomically, read_limited, write_manifest
from peftcore.files.tensors import PREFIX, parsed, read_file
from peftcore.methods.bottleneck import BottleneckConfig
from peftcore.prompts.learner import is_encoder_decoder

WEIGHTS = "adapter.safetensors"
"""File of the tensors in a directory of `adapters`."""

_REQUIRED: dict[str, Any] = {
    "architecture": None,
    "original_ln_before": False,
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "is_parallel": False,
    "use_gating": False,
    "phm_layer": False,
    "inv_adapter": None,
    "cross_adapter": False,
    "stochastic_depth": 0.0,
}
"""{option of `adapters`: the value with which a BOTTLENECK adapter computes the same function}."""
_KEYS = {
    "adapter_down.0.weight": "bottleneck_down",
    "adapter_down.0.bias": "bottleneck_down_bias",
    "adapter_up.weight": "bottleneck_up",
    "adapter_up.bias": "bottleneck_up_bias",
    "scaling": "bottleneck_scaling",
}
"""{end of a key of `adapters`: end of the key here}."""


def convert_adapters_directory(source: str | Path, directory: str | Path, model: nn.Module) -> None:
    """Write the bottleneck adapter of a directory of `adapters` into another directory, as BOTTLENECK.

    `PeftModel.from_pretrained(model, directory)` then loads it.

    Args:
        source: A directory that `save_adapter(..., use_safetensors=True)` of `adapters` has written.
        directory: Where to write; an existing directory is replaced.
        model: The base model, with or without its head; it says which layers end attention and MLP. Not changed.

    Raises:
        CheckpointError: A file is missing or damaged, or its tensors do not fit the model's blocks.
        ConfigError: The adapter computes another function than BOTTLENECK.
    """
    source = Path(source)
    if not (source / CONFIG_NAME).is_file():
        raise CheckpointError(f"no {CONFIG_NAME} in {source}; give a directory that `save_adapter` of adapters wrote")
    try:
        described = parsed_json(read_limited(source / CONFIG_NAME, LARGEST_CONFIG))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source / CONFIG_NAME} cannot be read ({error}); save the adapter again") from error
    options = _checked_options(described, source)
    if is_encoder_decoder(model):
        raise ConfigError(
            f"{type(model).__name__} has an encoder and a decoder, and only adapters of models with one stack are "
            "converted; go on with the library adapters, or train a new adapter with BottleneckConfig"
        )
    if not (source / WEIGHTS).is_file():
        raise CheckpointError(f"no {WEIGHTS} in {source}; save the adapter with use_safetensors=True")
    tensors = _renamed(parsed(read_file(source / WEIGHTS), source, WEIGHTS), described["name"], model)
    sizes = {len(tensor) for key, tensor in tensors.items() if key.endswith(".bottleneck_down")}
    if len(sizes) != 1:
        raise ConfigError(
            f"{source}: the bottlenecks have the sizes {sorted(sizes)}, and only one size for all is converted; train "
            "a new adapter with BottleneckConfig(bottleneck_size=...)"
        )
    config = BottleneckConfig(
        target_modules={key.removeprefix(PREFIX).rpartition(".")[0] for key in tensors},
        bottleneck_size=sizes.pop(),
        inference_mode=True,
        **options,
    )
    with directory_written_atomically(Path(directory)) as new:
        (new / CONFIG_NAME).write_text(config.to_json(), encoding="utf-8")
        save_file(tensors, new / WEIGHTS_NAME, metadata={"format": "pt"})
        write_manifest(new)


def _checked_options(described: Any, source: Path) -> dict[str, Any]:
    """Return the options of `BottleneckConfig` for the description of an adapter; ConfigError if none fit."""
    values = described.get("config") if isinstance(described, dict) else None
    if not isinstance(values, dict) or not isinstance(described.get("name"), str):
        raise ConfigError(
            f"{source / CONFIG_NAME} does not describe an adapter of the library adapters; give a directory that its "
            "`save_adapter` wrote"
        )
    for option, needed in _REQUIRED.items():
        if (value := values.get(option, needed)) != needed:
            raise ConfigError(
                f"{source}: {option} must be {json.dumps(needed)} for an adapter that sees one layer; got "
                f"{json.dumps(value)}. Of the bottleneck adapters only double_seq_bn (houlsby) is converted"
            )
    scaling = values.get("scaling", 1.0)
    return {
        "non_linearity": str(values.get("non_linearity")).lower().replace("leakyrelu", "leaky_relu"),
        "scaling": float(scaling) if isinstance(scaling, int) else scaling,
        "dropout": values.get("dropout", 0.0),
    }


def _renamed(tensors: Mapping[str, Tensor], name: str, model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors under the keys of a BOTTLENECK directory."""
    layers = _last_layers(model)
    blocks = {".".join(block.split(".")[-2:]): block for block, _ in layers}
    marker, renamed = f"adapters.{name}.", {}
    for key, tensor in tensors.items():
        match = re.match(r"(?:.*?\.)??(\w+\.\d+)\.(.*)", key)
        place, _, part = (match[2] if match else "").partition(marker)
        layer = layers.get((blocks.get(match[1], ""), "attention" in place)) if match else None
        if layer is None or part not in _KEYS:
            raise CheckpointError(
                f"{key} belongs to no block of this {type(model).__name__}, or is no bottleneck adapter; give the base "
                "model of the adapter"
            )
        renamed[f"{PREFIX}{layer}.{_KEYS[part]}"] = tensor
    return renamed


def _last_layers(model: nn.Module) -> dict[tuple[str, bool], str]:
    """Return {(block, True for its attention and False for its MLP): path of the layer with the part's output}."""
    architecture = detect(model)
    found: dict[tuple[str, bool], str] = {}
    for block in architecture.blocks[0].paths if architecture.blocks else ():
        for is_attention in (True, False):
            pattern = architecture.target_regex(architecture.targets("output" if is_attention else "down"))
            paths = [
                path
                for path, _ in model.named_modules()
                if path.startswith(f"{block}.") and re.fullmatch(pattern, path)
            ]
            if len(paths) == 1:
                found[block, is_attention] = paths[0]
    return found
