"""The base model in the forms that the stages need: as trained on, dequantised once, and as it was fetched.

`labels`, the names of classes, asks for the base under a classifier's head, which starts at random and is not
quantised; None for its own head, which says the next token.

An adapter trained on a quantised base has seen its dequantised weights, so it is judged and merged on those. They
are dequantised once and kept, because a quantised forward in evaluation mode is several times slower on a CPU.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from flows.errors import BaseModelError
from flows.params import Quantization
from peftcore.files import MANIFEST, damaged_files

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

EAGER_UP_TO = 512
"""Tokens up to which plain attention trains faster on a CPU than torch's fused kernel.

The fused kernel's backward took 44 ms a layer for 8 rows of 112 tokens (bf16, one core), a third of the whole step;
plain attention takes 5 ms, but its memory grows with the square of the length.
"""

# it warns, on import, of an optional inference kernel that training does not use
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def device() -> torch.device:
    """Where models run: this process's GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def check_base(folder: Path) -> str:
    """Check the base's files against its manifest; returns what identifies it, the manifest's SHA-256 (hex).

    Raises BaseModelError if the folder is absent or a file is damaged.
    """
    manifest = folder / MANIFEST
    if not manifest.exists():
        raise BaseModelError(f"there is no base model in {folder}; run the fetch stage first")
    damaged = damaged_files(folder)
    if damaged:
        raise BaseModelError(f"{folder}: {', '.join(damaged)} is damaged or gone; run the fetch stage again")
    return hashlib.sha256(manifest.read_bytes()).hexdigest()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder."""
    return AutoTokenizer.from_pretrained(folder)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the tokenizer's own, or the end of the sequence; attention and labels mask it."""
    return cast(int, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def load_original(folder: Path, dtype: torch.dtype, labels: Sequence[str] | None = None) -> PreTrainedModel:
    """A model as its folder holds it, in `dtype`: the base as it was fetched, or a merged one."""
    return _load(folder, dtype, None, labels)


def load_for_training(
    folder: Path, quantization: Quantization, longest: int, labels: Sequence[str] | None = None
) -> PreTrainedModel:
    """The base in the storage that `quantization` asks for; longest: tokens of the longest row to train on."""
    model = _load_quantized(folder, quantization, labels)
    if device().type == "cpu" and longest <= EAGER_UP_TO:
        model.set_attn_implementation("eager")
    return model


def load_for_inference(
    folder: Path, quantization: Quantization, labels: Sequence[str] | None = None
) -> PreTrainedModel:
    """The base in the storage that `quantization` asks for."""
    return _load_quantized(folder, quantization, labels)


def load_dequantized(folder: Path, quantization: Quantization, labels: Sequence[str] | None = None) -> PreTrainedModel:
    """The weights that training on `quantization` saw, as plain layers in its compute dtype."""
    model = _load_quantized(folder, quantization, labels)
    if quantization.storage == "none":
        return model
    return model.dequantize(compute_dtype(quantization)).eval()


def compute_dtype(quantization: Quantization) -> torch.dtype:
    """The dtype of activations, and of all weights that are not quantised."""
    return DTYPES[quantization.compute_dtype]


def _storage(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if quantization.storage == "none":
        return None
    if quantization.storage == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.storage,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def _load_quantized(folder: Path, quantization: Quantization, labels: Sequence[str] | None) -> PreTrainedModel:
    dtype = compute_dtype(quantization)
    return _load(folder, dtype, _storage(quantization, dtype), labels)


def _load(
    folder: Path, dtype: torch.dtype, storage: BitsAndBytesConfig | None, labels: Sequence[str] | None
) -> PreTrainedModel:
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device()}}
    if storage is not None:  # given as None it would hide what a folder says of its own storage
        options["quantization_config"] = storage
    if labels is None:
        return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options).eval()
    # a decoder's head reads the last token that is no padding
    options |= {"num_labels": len(labels), "pad_token_id": padding_id(load_tokenizer(folder))}
    options |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    return AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True, **options).eval()
