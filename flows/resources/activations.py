"""The memory of one training step's forward and backward, without doing either: on fake tensors, which have no data.

A step of a few real-width blocks runs under PyTorch's FakeTensorMode with the adapters, attention and recomputation
of the real one; each storage is counted while somebody holds it, as an allocator would. Blocks are alike, so two
depths give the whole. What is left to arithmetic is the loss, whose shape depends on the labels.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from flows.base.model import EAGER_UP_TO, compute_dtype, device
from flows.errors import PlanError
from flows.params import Params
from flows.resources.batches import BatchSize
from flows.resources.sizes import number_of_blocks, planned_adapter, with_blocks
from peftcore import get_peft_model
from peftcore.train import SELECTED, Mode, recompute_activations

LOGITS_AT_ONCE = 2**23
"""Logits (count) that `peftcore.train.linear_cross_entropy` holds of a batch."""
SOFTMAX_AT_ONCE = 2**21
"""Of these, what a CPU thread has in float32 at a time."""


@dataclass(frozen=True)
class Activations:
    """Bytes of one step."""

    kept: int
    """What the forward keeps for the backward."""
    working: int
    """What the backward needs beside it at its worst, gradients of weights apart."""
    loss: int
    """Of the output head and the loss."""

    @property
    def peak(self) -> int:
        return self.kept + max(self.working, self.loss)


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations have made and somebody still holds."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.counted = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.counted:
            return
        self.counted.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.counted.discard(key)
        self.now -= size


def activations(config: Any, params: Params, batch: BatchSize, longest: int, total_steps: int) -> Activations:
    """Memory of a step on `batch` with all of the configuration's blocks.

    longest: tokens of the longest row, by which attention is chosen. Raises PlanError for a model whose forward asks
    for values, which fake tensors have not.
    """
    blocks = number_of_blocks(config)
    few = (SELECTED, 2 * SELECTED)
    if blocks <= few[1]:
        kept, peak = _simulated(config, params, batch, longest, total_steps)
    else:
        (kept_few, peak_few), (kept_more, peak_more) = (
            _simulated(with_blocks(config, count), params, batch, longest, total_steps) for count in few
        )
        more = (blocks - few[1]) / (few[1] - few[0])
        kept = kept_more + round(more * (kept_more - kept_few))
        peak = peak_more + round(more * (peak_more - peak_few))
    return Activations(kept, peak - kept, _loss_bytes(config, params, batch))


def evaluation_bytes(config: Any, params: Params, batch: BatchSize, longest: int) -> int:
    """What the forward of an evaluation holds at its worst: of one block at a time, for nothing is kept.

    As of `activations`. An evaluation is without the adapter here, whose own values are small beside the block's.
    """
    shallow = with_blocks(config, min(SELECTED, number_of_blocks(config)))
    with FakeTensorMode(), torch.device(device()):
        model = _base(shallow, params, longest).eval()
        inputs = _inputs(model, params, batch)
        live = _Live([*model.parameters(), *model.buffers(), *inputs.values()])
        with _said(model), torch.no_grad(), live:
            model.base_model(**inputs, use_cache=False)
        return live.peak


def _simulated(config: Any, params: Params, batch: BatchSize, longest: int, total_steps: int) -> tuple[int, int]:
    """(bytes kept after the forward, bytes at the worst of forward and backward)"""
    dtype, place = compute_dtype(params.quantization), device()
    with FakeTensorMode(), torch.device(place):
        model: Any = get_peft_model(_base(config, params, longest), planned_adapter(params, total_steps)).train()
        recompute_activations(model, _mode(params, place))
        inputs = _inputs(model, params, batch)
        live = _Live([*model.parameters(), *model.buffers(), *inputs.values()])
        with _said(model), live, torch.autocast(place.type, torch.float16, dtype is torch.float16):
            hidden = model.base_model(**inputs, use_cache=False)[0]
            kept = live.now
            hidden.backward(torch.empty_like(hidden))
        gradients = sum(p.numel() * p.itemsize for p in model.parameters() if p.requires_grad)
        return kept, max(kept, live.peak - gradients)


def _base(config: Any, params: Params, longest: int) -> Any:
    attention = "eager" if device().type == "cpu" and longest <= EAGER_UP_TO else None
    dtype = compute_dtype(params.quantization)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def _inputs(model: Any, params: Params, batch: BatchSize) -> dict[str, Tensor]:
    """Embedded tokens, and a mask of the pairs that attend, as the model would make it."""
    (rows, width), dtype = batch.shape, compute_dtype(params.quantization)
    stream = torch.empty(rows, width, model.get_input_embeddings().embedding_dim, dtype=dtype, requires_grad=True)
    return {"inputs_embeds": stream, "attention_mask": torch.empty(rows, 1, width, width, dtype=dtype)}


@contextmanager
def _said(model: Any) -> Iterator[None]:
    """Say it in a PlanError where the model asks for what fake tensors have not."""
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException) as error:
        raise PlanError(
            f"{type(model).__name__} asks for the values of its tensors, so its activations cannot be simulated "
            f"({str(error).splitlines()[0]})"
        ) from error


def _mode(params: Params, place: torch.device) -> Mode:
    """Recomputation as it is simulated: where the inputs of blocks wait elsewhere, they are counted here all the same.

    Without a GPU nothing can be offloaded, and training says so.
    """
    mode = params.train.gradient_checkpointing
    return "blocks" if mode == "offload" and place.type == "cpu" else mode


def _loss_bytes(config: Any, params: Params, batch: BatchSize) -> int:
    """The supervised rows with their gradient, and the chunks that logits and softmax are computed in."""
    text = config.get_text_config(decoder=True)
    width = compute_dtype(params.quantization).itemsize
    chunk = min(batch.supervised, max(1, LOGITS_AT_ONCE // text.vocab_size))
    at_once = chunk
    if device().type == "cpu":
        at_once = min(chunk, max(1, SOFTMAX_AT_ONCE * torch.get_num_threads() // text.vocab_size))
    rows = 2 * batch.supervised * text.hidden_size * width
    return rows + chunk * text.vocab_size * width + 2 * at_once * text.vocab_size * 4
