"""Calibration of the quantised base on training rows. GPTQ: arXiv:2210.17323."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flows.base.calibrated import STORED
from flows.base.folder import check_base, load_tokenizer, padding_id
from flows.base.identity import base_identity
from flows.base.model import load_for_inference
from flows.data.rows import Row, read_rows
from flows.errors import StageError
from flows.params import Params
from flows.paths import Paths
from flows.training.objectives import check_split, rows_of, start_batch
from peftcore import calibrate_rounding
from peftcore.bases import base_weight, is_adaptable

log = logging.getLogger(__name__)
BATCH_SIZE = 8
"""Rows of a forward pass."""


def save_calibrated_base(params: Params, paths: Paths, folder: Path) -> dict[str, Any]:
    """Round the quantised base on training rows and write its transformers folder with its tokenizer.

    Args:
        params: The parameters of the run.
        paths: The project's files.
        folder: The folder to fill.

    Returns:
        The record of the calibration.

    Raises:
        StageError: The rows have too few tokens, or the base cannot be loaded as a causal language model.
        ConfigError: A layer cannot be rounded, or its inputs are not finite.
    """
    check_base(paths.base)
    calibration, split = params.quantization.calibration, paths.split("train")
    _check_architecture(paths.base, calibration.method)
    check_split(params, split)
    rows = read_rows(split, list(rows_of(params).columns), calibration.rows)
    model: Any = load_for_inference(paths.base, params.quantization.uncalibrated)
    tokenizer = load_tokenizer(paths.base)
    batches = list(_batches(params, rows, padding_id(tokenizer), model.device))
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    _check_tokens(model, tokens, len(rows))
    calibrate_rounding(model, batches, paths.base, calibration.damping, forward=_without_logits)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    log.info("calibrated on %d rows of %d tokens", len(rows), tokens)
    return {
        "method": calibration.method,
        "base_model": base_identity(paths.base),
        "quantization": {name: getattr(params.quantization, name) for name in STORED},
        "rows": len(rows),
        "tokens": tokens,
        "damping": calibration.damping,
    }


def _check_architecture(base: Path, method: str) -> None:
    """Raise StageError if transformers has no causal language model of the base's architecture."""
    config: Any = AutoConfig.from_pretrained(base, local_files_only=True)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise StageError(
            f"quantization.calibration.method is {method}, which needs a base that AutoModelForCausalLM loads, and "
            f"base.source is a {config.model_type}; give method none, or a base such as Llama"
        )


def _batches(params: Params, rows: list[Row], pad: int, device: torch.device) -> Iterator[dict[str, Any]]:
    for first in range(0, len(rows), BATCH_SIZE):
        batch = start_batch(params, rows[first : first + BATCH_SIZE], pad)
        yield {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}


def _without_logits(model: Any, batch: Mapping[str, Any]) -> Any:
    """Run the model without its output head, which is not quantised."""
    return model.base_model(**batch, use_cache=False)


def _check_tokens(model: Any, tokens: int, rows: int) -> None:
    """Raise StageError if the rows have fewer tokens than a quantised layer has inputs."""
    layers = (base_weight(module, path) for path, module in model.named_modules() if is_adaptable(module))
    widest = max((layer.in_features for layer in layers if layer.quantized), default=0)
    if tokens < widest:
        raise StageError(
            f"quantization.calibration.rows: {rows} rows have {tokens} tokens, and the second moment of a layer's "
            f"{widest} inputs needs at least as many; give more rows, or quantization.calibration.method: none"
        )
