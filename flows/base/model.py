"""Loading of the base model: quantised for training, dequantised for evaluation and merging, or as fetched.

If a function gets `labels`, the names of a head's outputs, it loads the base with a classification head. This head is
not quantised, and randomly initialised if the base has none. Without names, `labels=()`, it loads the base without a
head, for embeddings. With `labels=None` it loads the language-model head. `task` (`peftcore.TaskType`) asks for another
head: classes of tokens, or an encoder-decoder's.

The folder is that of the base as fetched, or of the calibrated base (`calibrated.trained_base`), whose weights are
quantised already. A folder that does not fit `quantization.calibration` is refused.

Training on a quantised base computes with dequantised weights, so evaluation and merging use the same dequantised
weights. They are dequantised once, because a quantised forward in evaluation mode is several times slower on a CPU.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    BitsAndBytesConfig,
    PreTrainedModel,
    TorchAoConfig,
)
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging as transformers_logging

from flows.base.calibrated import calibration_record, check_calibration, recorded_quantization
from flows.base.folder import check_base, load_tokenizer, padding_id
from flows.base.gguf import holds_gguf, load_packed
from flows.base.heads import check_head, head_class, without_pooler
from flows.errors import BaseModelError
from flows.params import Quantization
from peftcore.bases import add_packed_copies, dequantize_model, fast_dtype
from peftcore.cpu_decoding import use_compiled_code
from peftcore.cpu_quantization import use_compiled_quantization
from peftcore.errors import require_extra

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_PACKAGES = {"torchao_int8": "torchao", "hqq4": "hqq"}
"""Package, and extra of this distribution, of the storages that bitsandbytes does not have."""

CLASS_HEADS = ("classifier", "score")
"""Names of heads of classes. They are new, so they are never quantised; transformers would quantise one with a bias."""

EAGER_UP_TO = 512
"""Tokens up to which eager attention trains faster on a CPU than torch's fused kernel.

The fused kernel's backward took 44 ms a layer for 8 rows of 112 tokens (bf16, one core), a third of the step; eager
attention takes 5 ms, but its memory grows with the square of the length."""


def device() -> torch.device:
    """Return the device of models: this process's GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def load_original(
    folder: Path, dtype: torch.dtype, labels: Sequence[str] | None = None, task: str | None = None
) -> PreTrainedModel:
    """Load a model folder in `dtype`: the base as fetched, or a merged model."""
    return _load(folder, dtype, None, labels, task)


def load_for_training(
    folder: Path,
    quantization: Quantization,
    longest: int,
    labels: Sequence[str] | None = None,
    task: str | None = None,
) -> PreTrainedModel:
    """Load the base in the storage of `quantization`. longest: tokens of the longest training row."""
    model = _load_quantized(folder, quantization, labels, task)
    if device().type == "cpu" and longest <= EAGER_UP_TO:
        model.set_attn_implementation("eager")
    return model


def load_for_inference(
    folder: Path, quantization: Quantization, labels: Sequence[str] | None = None, task: str | None = None
) -> PreTrainedModel:
    """Load the base in the storage of `quantization`."""
    return _load_quantized(folder, quantization, labels, task)


def load_dequantized(
    folder: Path, quantization: Quantization, labels: Sequence[str] | None = None, task: str | None = None
) -> PreTrainedModel:
    """Load the weights that training on `quantization` saw, as plain layers in the compute dtype."""
    model = _load_quantized(folder, quantization, labels, task)
    if quantization.storage == "none":
        return model
    if quantization.storage in _PACKAGES:
        return dequantize_model(model, compute_dtype(quantization)).eval()
    return model.dequantize(compute_dtype(quantization)).eval()


def load_calibrated(folder: Path) -> PreTrainedModel:
    """Load the calibrated base of a folder in the storage of its own record, dequantised."""
    record = calibration_record(folder)
    assert record is not None, folder
    check_base(folder)
    return load_dequantized(folder, recorded_quantization(record))


def load_for_evaluation(
    folder: Path, quantization: Quantization, labels: Sequence[str] | None = None, task: str | None = None
) -> PreTrainedModel:
    """Load the weights that training on `quantization` saw, on a CPU with packed copies and compiled code."""
    model = load_dequantized(folder, quantization, labels, task)
    add_packed_copies(model, exact=True)
    use_compiled_code(model)
    return model


def load_for_serving(folder: Path, quantization: Quantization) -> PreTrainedModel:
    """Load the dequantised model to serve, with packed copies for CPUs if the compute dtype is automatic.

    On a CPU without fast products in 16 bits the model is in float32, and its copies in float16, which rounds the
    dequantised weights to 11 bits. On other CPUs the model is in bfloat16, which rounds them to 8 bits, and its copies
    have the same values.
    """
    model = load_dequantized(folder, quantization)
    if quantization.compute_dtype == "auto":
        add_packed_copies(model)
    return model


def compute_dtype(quantization: Quantization) -> torch.dtype:
    """Return the dtype of activations, and of all weights that are not quantised."""
    name = quantization.compute_dtype
    return fast_dtype(torch.bfloat16, device()) if name == "auto" else DTYPES[name]


def with_merged_dtype(quantization: Quantization) -> Quantization:
    """Return the same storage with the compute dtype that merged weights are stored in; 16 bits on each machine."""
    automatic = quantization.compute_dtype == "auto"
    return quantization.model_copy(update={"compute_dtype": "bfloat16"}) if automatic else quantization


def _storage(
    quantization: Quantization, dtype: torch.dtype, labels: Sequence[str] | None
) -> BitsAndBytesConfig | TorchAoConfig | None:
    heads = None if labels is None else list(CLASS_HEADS)
    if quantization.storage in _PACKAGES:
        package = _PACKAGES[quantization.storage]
        require_extra(package, f"quantization.storage: {quantization.storage}", package)
    if quantization.storage in ("none", "hqq4"):
        return None
    if quantization.storage == "torchao_int8":
        torchao: Any = import_module("torchao.quantization")
        return TorchAoConfig(torchao.Int8WeightOnlyConfig(set_inductor_config=False), modules_to_not_convert=heads)
    if quantization.storage == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=heads)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.storage,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=heads,
    )


def _load_quantized(
    folder: Path, quantization: Quantization, labels: Sequence[str] | None, task: str | None
) -> PreTrainedModel:
    check_calibration(folder, quantization)
    dtype = compute_dtype(quantization)
    if quantization.storage in ("nf4", "fp4") and device().type == "cpu":
        use_compiled_quantization()
    if quantization.is_calibrated:
        return _load(folder, dtype, None, labels, task)  # the folder's own configuration has the storage
    if quantization.storage == "gguf":
        return _load_gguf(folder, dtype, labels, task)
    model = _load(folder, dtype, _storage(quantization, dtype, labels), labels, task)
    return _in_hqq(model, dtype) if quantization.storage == "hqq4" else model


def _in_hqq(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Quantise linear layers by HQQ in place, as transformers 5.24 cannot: 4 bits, 64 inputs to a scale and zero."""
    hqq: Any = import_module("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    skipped = [*get_keys_to_not_convert(model), *CLASS_HEADS]
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and should_convert_module(path, skipped):
            quantised = hqq.HQQLinear(
                layer.requires_grad_(False), config, compute_dtype=dtype, device=str(layer.weight.device)
            )
            model.set_submodule(path, quantised)
    return model.eval()


def _load_gguf(folder: Path, dtype: torch.dtype, labels: Sequence[str] | None, task: str | None) -> PreTrainedModel:
    padding = {} if labels is None else {"pad_token_id": padding_id(load_tokenizer(folder))}
    return load_packed(folder, dtype, device(), labels, head_class(task, labels), **padding)


def _load(
    folder: Path,
    dtype: torch.dtype,
    storage: BitsAndBytesConfig | TorchAoConfig | None,
    labels: Sequence[str] | None,
    task: str | None,
) -> PreTrainedModel:
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if holds_gguf(folder):
        if storage is not None:
            raise BaseModelError(
                f"{folder} holds a GGUF file, fetched for quantization.storage gguf; run the fetch stage again"
            )
        return cast(PreTrainedModel, _load_gguf(folder, dtype, labels, task).dequantize(dtype)).eval()
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device()}}
    if storage is not None:  # None would hide the storage in the folder's own configuration
        options["quantization_config"] = storage
    kind = head_class(task, labels)
    if task is not None:
        check_head(folder, task)
    if kind is AutoModel:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        return AutoModel.from_pretrained(folder, local_files_only=True, **options, **without_pooler(config)).eval()
    if labels is None:
        return kind.from_pretrained(folder, local_files_only=True, **options).eval()
    # a decoder's classification head reads the last token that is not padding
    options |= {"num_labels": len(labels), "pad_token_id": padding_id(load_tokenizer(folder))}
    options |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    return kind.from_pretrained(folder, local_files_only=True, **options).eval()
