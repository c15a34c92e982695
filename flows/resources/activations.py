"""Memory of one training step's forward and backward, simulated on fake tensors, which hold no data.

A step of a few blocks of real width runs under PyTorch's FakeTensorMode with the run's adapters, attention and
recomputation. Each storage is counted while it is alive, as in an allocator. Blocks are alike, so two depths give all
blocks by extrapolation. Only the loss is computed by arithmetic, because its shape depends on the labels.
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
from flows.errors import EstimateError
from flows.params import Params
from flows.resources.batches import BatchSize
from flows.resources.sizes import number_of_blocks, sized_adapter, with_blocks
from peftcore import get_peft_model
from peftcore.train import SELECTED, Mode, recompute_activations

LOGITS_AT_ONCE = 2**23
"""Logits (count) that `peftcore.train.linear_cross_entropy` computes per chunk."""
SOFTMAX_AT_ONCE = 2**21
"""Logits (count) that a CPU thread converts to float32 at a time."""


@dataclass(frozen=True)
class Activations:
    """Memory of one step (bytes)."""

    kept: int
    """Activations that the forward saves for the backward."""
    working: int
    """Peak of the backward on top, without gradients of weights."""
    loss: int
    """Output head and loss."""

    @property
    def peak(self) -> int:
        """Maximum of the step."""
        return self.kept + max(self.working, self.loss)


class _Live(TorchDispatchMode):
    """Counts the bytes of live storages that operations have created."""

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
    """Return the memory of a step on `batch` with all blocks of the configuration.

    Args:
        config: The base's configuration.
        params: The parameters of the run.
        batch: Shape of the batch.
        longest: Tokens of the longest row, which decide the attention implementation.
        total_steps: Optimiser steps of the run.

    Raises:
        EstimateError: The model's forward needs values, which fake tensors do not have.
    """
    blocks = number_of_blocks(config)
    # with selective recomputation, a group of blocks is what repeats
    few = (SELECTED, 2 * SELECTED) if _mode(params, device()) == "selective" else (1, 2)
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
    """Return the peak of an evaluation's forward, which keeps one block at a time.

    Arguments as in `activations`. The adapter is left out, because its own values are small beside a block's.
    """
    shallow = with_blocks(config, min(SELECTED, number_of_blocks(config)))
    with FakeTensorMode(), torch.device(device()):
        model = _base(shallow, params, longest).eval()
        inputs = _inputs(model, params, batch)
        live = _Live([*model.parameters(), *model.buffers(), *inputs.values()])
        with _explained(model), torch.no_grad(), live:
            getattr(model, model.base_model_prefix)(**inputs, use_cache=False)
        return live.peak


def _simulated(config: Any, params: Params, batch: BatchSize, longest: int, total_steps: int) -> tuple[int, int]:
    """Return (bytes kept after the forward, peak bytes of forward and backward)."""
    dtype, place = compute_dtype(params.quantization), device()
    with FakeTensorMode(), torch.device(place):
        model: Any = get_peft_model(_base(config, params, longest), sized_adapter(params, total_steps)).train()
        recompute_activations(model, _mode(params, place))
        inputs = _inputs(model, params, batch)
        live = _Live([*model.parameters(), *model.buffers(), *inputs.values()])
        with _explained(model), live, torch.autocast(place.type, torch.float16, dtype is torch.float16):
            hidden = getattr(model, model.base_model_prefix)(**inputs, use_cache=False)[0]
            saved = live.now
            hidden.backward(torch.empty_like(hidden))
        gradients = sum(p.numel() * p.itemsize for p in model.parameters() if p.requires_grad)
        return saved, max(saved, live.peak - gradients)


def _base(config: Any, params: Params, longest: int) -> Any:
    attention = "eager" if device().type == "cpu" and longest <= EAGER_UP_TO else None
    dtype = compute_dtype(params.quantization)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def _inputs(model: Any, params: Params, batch: BatchSize) -> dict[str, Tensor]:
    """Return embedded tokens and a 4D attention mask, as the model would create them."""
    (rows, width), dtype = batch.shape, compute_dtype(params.quantization)
    stream = torch.empty(rows, width, model.get_input_embeddings().embedding_dim, dtype=dtype, requires_grad=True)
    return {"inputs_embeds": stream, "attention_mask": torch.empty(rows, 1, width, width, dtype=dtype)}


@contextmanager
def _explained(model: Any) -> Iterator[None]:
    """Turn errors of fake tensors into an EstimateError."""
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException) as error:
        raise EstimateError(
            f"{type(model).__name__} needs the values of its tensors, so its activations cannot be simulated "
            f"({str(error).splitlines()[0]}); measure the memory with a short run instead (train.max_steps: 2)"
        ) from error


def _mode(params: Params, place: torch.device) -> Mode:
    """Return the recomputation mode to simulate: offloaded inputs count here, because a CPU cannot offload."""
    mode = params.train.gradient_checkpointing
    return "blocks" if mode == "offload" and place.type == "cpu" else mode


def _loss_bytes(config: Any, params: Params, batch: BatchSize) -> int:
    """Return the bytes of supervised rows with gradients, and of the chunks of logits and softmax."""
    text = config.get_text_config(decoder=True)
    width = compute_dtype(params.quantization).itemsize
    chunk = min(batch.supervised, max(1, LOGITS_AT_ONCE // text.vocab_size))
    at_once = chunk
    if device().type == "cpu":
        at_once = min(chunk, max(1, SOFTMAX_AT_ONCE * torch.get_num_threads() // text.vocab_size))
    rows = 2 * batch.supervised * text.hidden_size * width
    return rows + chunk * text.vocab_size * width + 2 * at_once * text.vocab_size * 4
