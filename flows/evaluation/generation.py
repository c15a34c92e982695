"""Generation for many prompts, greedy or sampled: batched by length, with a key-value cache.

Prompts of a decoder are padded on the left, after the beginning that all of them share, which is computed once. The
sources of an encoder-decoder are padded on the right.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from flows.base.folder import padding_id
from flows.data.chat import end_token
from flows.evaluation.common_prefix import ModelAfterPrefix, model_after_prefix
from flows.evaluation.prompt_states import PromptStates
from flows.evaluation.scoring import by_length


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Attributes:
        text: The answer without special tokens.
        has_eos: True if the model ended its turn within the token limit.
    """

    text: str
    has_eos: bool
    tokens: int
    """Number of generated tokens, including the end of turn."""


@dataclass(frozen=True)
class Answers:
    """Answers in the order of their prompts, and the seconds that all of them took."""

    answers: list[Answer]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of wall-clock time; the time to read prompts counts, unless `states` had them."""
        return sum(answer.tokens for answer in self.answers) / self.seconds


@dataclass(frozen=True)
class Sampling:
    """Sampling of answers; the same seed and prompts give the same answers. top_p: share of the probability to use."""

    seed: int
    temperature: float = 1.0
    top_p: float = 1.0


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    bar: Any = None,
    sampling: Sampling | None = None,
    states: PromptStates | None = None,
) -> Answers:
    """Answer each prompt.

    Args:
        model: A causal language model, or an encoder-decoder, whose prompts are its sources.
        tokenizer: The model's tokenizer.
        prompts: Token ids, ending with the template's generation prompt.
        max_new_tokens: Maximum tokens of an answer.
        batch_size: Prompts per batch.
        bar: Progress bar in rows.
        sampling: How to sample the answers; None: greedily. The random state of the process stays.
        states: States of the prompts, if they have been read before; not used if one is missing.
    """
    end = end_token(tokenizer)
    pad = padding_id(tokenizer)
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=pad, use_cache=True)
    if sampling is None:
        config.update(do_sample=False)
    else:
        # top_k: transformers' own default keeps 50 tokens only
        config.update(do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0)
    has_encoder = bool(getattr(model.config, "is_encoder_decoder", False))
    if has_encoder:
        config.decoder_start_token_id = getattr(model.generation_config, "decoder_start_token_id", None)
    answers: list[Answer | None] = [None] * len(prompts)
    started = time.perf_counter()
    read = states if states is not None and states.is_complete else None
    after = read.after if read else model_after_prefix(model, prompts, min(map(len, prompts), default=0) - 1)
    with contiguous_head(model), _seeded(sampling, model.device):
        for batch in by_length([len(prompt) for prompt in prompts], batch_size):
            inputs = _padded([prompts[i] for i in batch], pad, model.device, left=not has_encoder, after=after)
            if read:
                inputs["cache"] = read.cache_of(batch)
            with torch.no_grad():
                output = cast(Tensor, model.generate(**inputs, generation_config=config))  # pyright: ignore
            begin = 1 if has_encoder else inputs["input_ids"].shape[1]  # a decoder of its own has a start token
            for i, ids in zip(batch, output[:, begin:].tolist(), strict=True):
                answers[i] = _answer(tokenizer, ids, end)
            if bar is not None:
                speed = sum(answer.tokens for answer in answers if answer) / (time.perf_counter() - started)
                bar.set_postfix({"tokens/s": f"{speed:,.0f}"}, refresh=False)
                bar.update(len(batch))
    return Answers(cast(list[Answer], answers), time.perf_counter() - started)


@contextmanager
def _seeded(sampling: Sampling | None, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's generators, and restore them afterwards; without sampling, do nothing."""
    if sampling is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        yield


@contextmanager
def contiguous_head(model: PreTrainedModel) -> Iterator[None]:
    """Make the output head read contiguous rows, which is faster on a CPU and gives the same numbers."""
    hook = cast(nn.Module, model.get_output_embeddings()).register_forward_pre_hook(_contiguous)
    try:
        yield
    finally:
        hook.remove()


def _contiguous(_head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # the last positions are a strided view, for which a bf16 head on a CPU copies its whole weight
    return (inputs[0].contiguous(), *inputs[1:])


def _padded(
    prompts: Sequence[Sequence[int]], pad: int, device: torch.device, left: bool, after: ModelAfterPrefix | None
) -> dict[str, Any]:
    """Return the arguments of `generate`. What `after` has read comes before the padding, with its cache."""
    start = 0 if after is None else after.length
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), pad)
    attention_mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for i, prompt in enumerate(prompts):
        begin = start + width - len(prompt) if left else 0
        rest = len(prompt) - start
        input_ids[i, :start] = torch.as_tensor(prompt[:start])
        attention_mask[i, :start] = 1
        input_ids[i, begin : begin + rest] = torch.as_tensor(prompt[start:])
        attention_mask[i, begin : begin + rest] = 1
    inputs: dict[str, Any] = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
    return inputs if after is None else inputs | {"cache": after.cache(len(prompts), generates=True)}


def _answer(tokenizer: PreTrainedTokenizerBase, ids: list[int], end: int) -> Answer:
    has_eos = end in ids
    content = ids[: ids.index(end)] if has_eos else ids
    text = cast(str, tokenizer.decode(content, skip_special_tokens=True)).strip()
    return Answer(text, has_eos, len(content) + has_eos)
