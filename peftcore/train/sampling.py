"""Answers that the model in training generates: greedy or sampled, in batches, with a key-value cache.

The random numbers depend on a seed alone, and the random state of the process stays as it was. So a resumed run samples
the answers that the interrupted run would have sampled.

Shapes: B prompts, T tokens of the longest prompt.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers import GenerationConfig

from peftcore.errors import ConfigError
from peftcore.train.batches import WEIGHT, RightPaddingCollator, row_weights
from peftcore.train.losses import IGNORED
from peftcore.train.out_of_memory import is_out_of_memory
from peftcore.train.reference import inference_mode

_LOG = logging.getLogger(__name__)

ROWS = "rows"
"""Key of a batch of prompts: its rows, a list of mappings."""


@dataclass(frozen=True)
class Sampling:
    """Options for sampling answers: length, temperature and share of the probability.

    Raises:
        ConfigError: A value is out of range.
    """

    max_new_tokens: int = 256
    """Maximum tokens of an answer, its end included."""
    temperature: float = 1.0
    """Divisor of the logits, above 0."""
    top_p: float = 1.0
    """Share of the probability to sample from, above 0 and at most 1."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1; got {self.max_new_tokens}")
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be above 0; got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1; got {self.top_p}")


@dataclass(frozen=True)
class SampledAnswer:
    """Token ids of an answer, with the end token if the answer has ended."""

    ids: list[int]
    ended: bool
    """True if the model has ended the answer within the maximum number of tokens."""

    def text(self, tokenizer: Any) -> str:
        """Return the answer's text without special tokens and without white space at its ends."""
        content = self.ids[:-1] if self.ended else self.ids
        return cast(str, tokenizer.decode(content, skip_special_tokens=True)).strip()


@dataclass
class PromptCollator:
    """Collator of prompts whose answers the trainer generates.

    A row is {"input_ids": token ids of the prompt} and any further columns, which stay with the row.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the `rows`, their `weight` (B,), 1 by default, and `labels` (B, 1), which mark rows that count."""
        labels = torch.zeros(len(rows), 1).long()
        return {ROWS: [dict(row) for row in rows], WEIGHT: row_weights(rows), "labels": labels}


class AnswerSampler:
    """Generation of answers by a model in training.

    Args:
        sampling: How answers are sampled.
        end: Token ids that end an answer.
        pad: Token id of padding.
    """

    def __init__(self, sampling: Sampling, end: Sequence[int], pad: int) -> None:
        self.sampling = sampling
        self.end = list(end)
        self.pad = pad
        self.rows_at_once: int | None = None
        """Prompts (count) whose answers fit into memory together. None: all have fitted so far."""

    def answers(
        self, model: Any, prompts: Sequence[Sequence[int]], seed: int | None, split: bool = True
    ) -> list[SampledAnswer]:
        """Return an answer to each prompt.

        Args:
            model: A causal language model with adapters. It generates in evaluation mode; its training flags stay.
            prompts: Token ids of each prompt.
            seed: Seed of the sampling. None: greedy answers.
            split: After an out-of-memory error, generate fewer answers at once. False: raise the error.
        """
        answers: list[SampledAnswer] = []
        with inference_mode(model), contiguous_head(model):
            while len(answers) < len(prompts):
                first = len(answers)
                rows = min(self.rows_at_once or len(prompts), len(prompts) - first)
                try:
                    with _seeded(None if seed is None else seed + first, model.device):
                        answers += self._generated(model, prompts[first : first + rows], seed is not None)
                    continue
                except (RuntimeError, MemoryError) as error:
                    if not split or rows == 1 or not is_out_of_memory(error):
                        raise
                # outside of the except block the traceback no longer holds the failed pass's tensors
                clear_device_cache(garbage_collection=True)
                self.rows_at_once = rows // 2
                _LOG.warning("out of memory: from now on %d answers are generated at once", self.rows_at_once)
        return answers

    def _generated(self, model: Any, prompts: Sequence[Sequence[int]], sampled: bool) -> list[SampledAnswer]:
        width = max(map(len, prompts))
        input_ids = torch.full((len(prompts), width), self.pad)
        attention_mask = torch.zeros_like(input_ids)
        for i, prompt in enumerate(prompts):
            input_ids[i, width - len(prompt) :] = torch.as_tensor(prompt)
            attention_mask[i, width - len(prompt) :] = 1
        device = model.device
        output = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            generation_config=self._config(sampled),
        )
        return [self._answer(ids) for ids in cast(Tensor, output)[:, width:].tolist()]

    def _config(self, sampled: bool) -> GenerationConfig:
        config = GenerationConfig(
            max_new_tokens=self.sampling.max_new_tokens,
            eos_token_id=self.end,
            pad_token_id=self.pad,
            use_cache=True,
            do_sample=sampled,
            # values that a model's own generation_config would otherwise fill in, and that change its distribution
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
        )
        if sampled:
            config.update(temperature=self.sampling.temperature, top_p=self.sampling.top_p, top_k=0, typical_p=1.0)
        return config

    def _answer(self, ids: list[int]) -> SampledAnswer:
        stop = next((i for i, token in enumerate(ids) if token in self.end), None)
        return SampledAnswer(ids if stop is None else ids[: stop + 1], stop is not None)


def supervised_batch(prompts: Sequence[Sequence[int]], answers: Sequence[SampledAnswer], pad: int) -> dict[str, Tensor]:
    """Return prompts with their answers as a batch padded on the right; labels are -100 except on the answers."""
    rows = [
        {"input_ids": [*prompt, *answer.ids], "labels": [*[IGNORED] * len(prompt), *answer.ids]}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return RightPaddingCollator(pad)(rows)


def sampling_seed(seed: int, step: int, part: int, process: int) -> int:
    """Return the seed of a batch's answers.

    Args:
        seed: Seed of the run.
        step: Optimiser steps before this one.
        part: Number of the batch in its optimiser step.
        process: Index of the training process.
    """
    return (((seed * 1_000_003 + step) * 1_009 + part) * 1_009 + process) % 2**63


@contextmanager
def contiguous_head(model: Any) -> Iterator[None]:
    """Make the output head read contiguous rows, which is faster on a CPU and gives the same numbers."""
    head: nn.Module | None = model.get_output_embeddings()
    if head is None:
        yield
        return
    # the last positions are a strided view, for which a bf16 head on a CPU copies its whole weight
    hook = head.register_forward_pre_hook(lambda _head, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's generators, and restore them afterwards; without a seed, do nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
