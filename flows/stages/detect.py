"""detect: architecture of the base and default targets of adapters, from its structure, without loading weights."""

import json
import logging
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, PreTrainedModel

from flows.base.folder import check_base
from flows.base.heads import published_class
from flows.errors import BaseModelError
from flows.params import Params
from flows.paths import Paths
from flows.runtime.stage import start
from peftcore import TargetError
from peftcore.detection import Architecture, detect
from peftcore.files import write_atomically

logger = logging.getLogger("flows.detect")


def run(params: Params, paths: Paths) -> None:
    """Write `paths.architecture`.

    Raises:
        BaseModelError: The base is absent, damaged, not a model that transformers knows, or has nothing to adapt. The
            file of an earlier run then stays.
    """
    check_base(paths.base)
    model = without_weights(paths.base)
    try:
        architecture = detect(model)
    except TargetError as error:
        raise BaseModelError(f"{paths.base}: {error}") from error
    write_atomically(paths.architecture, json.dumps(architecture.to_dict(), indent=2) + "\n")
    logger.info(
        "%s: %s, %d blocks; LoRA's default targets are %s",
        architecture.class_name,
        architecture.kind,
        architecture.num_blocks,
        ", ".join(architecture.default_targets),
    )
    show(architecture)


def without_weights(folder: Path) -> PreTrainedModel:
    """Return the model of a folder's config.json on the meta device, which takes no memory.

    Raises:
        BaseModelError: The configuration is unknown or invalid.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            return published_class(config).from_config(config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        # raised for a config.json that is absent, not JSON, of an unknown type, or with impossible sizes
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BaseModelError(
            f"{folder / 'config.json'} does not describe a language model or encoder that transformers knows; "
            f"set base.source to a decoder such as Llama or Qwen, or an encoder such as BERT, or upgrade transformers "
            f"({reason})"
        ) from error


def show(architecture: Architecture) -> None:
    """Print a row for each kind of layer."""
    table = Table(title=_title(architecture), title_justify="left")
    for heading in ("target", "role"):
        table.add_column(heading)
    for heading in ("in", "out", "count"):
        table.add_column(heading, justify="right")
    table.add_column("4-bit")
    table.add_column("LoRA default")
    for name, info in architecture.target_modules.items():
        mark = ("yes" if info.quantizable else "", "yes" if name in architecture.default_targets else "")
        table.add_row(name, info.role, str(info.in_features), str(info.out_features), str(info.count), *mark)
    Console().print(table)


def _title(architecture: Architecture) -> str:
    millions, tied = architecture.parameters / 1e6, len(architecture.tied_weights)
    sizes = f"{architecture.memory_bfloat16 / 2**20:,.0f} MiB in bf16, {architecture.memory_nf4 / 2**20:,.0f} in NF4"
    return f"{architecture.class_name}: {millions:,.1f} M weights, {sizes}, {tied} tied"


if __name__ == "__main__":
    start(run)
