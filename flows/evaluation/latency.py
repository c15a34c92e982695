"""How long one request takes that has the model to itself: to its first token, and to each that follows.

Greedy, batch 1, with a key-value cache, as many tokens for each; the first request warms up and is not counted. Base
and adapter take turns, so that what else the machine does meets both. Medians, which a pause does not move.
"""

import contextlib
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from flows.base.model import padding_id
from flows.evaluation.generation import contiguous_head
from flows.runtime.progress import progress

NEW_TOKENS = 16
"""Tokens that each request asks for."""


class _Clock(StoppingCriteria):
    """Notes when each token was there; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        self.times.append(_now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def measure_latency(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]]
) -> dict[str, dict[str, float]]:
    """{"base", "adapter"} -> {"first_token_ms", "token_ms"}; prompts: token ids; model: a PeftModel, unmerged."""
    times: dict[str, list[list[float]]] = {"base": [], "adapter": []}
    with contiguous_head(model), progress(2 * (len(prompts) + 1), "latency", "request") as bar:
        for number, prompt in enumerate([prompts[0], *prompts]):
            for name, context in (("base", model.disable_adapter()), ("adapter", contextlib.nullcontext())):
                with context:
                    taken = _request(model, tokenizer, prompt)
                if number > 0:
                    times[name].append(taken)
                bar.update(1)
    return {
        name: {
            "first_token_ms": round(1e3 * median(taken[0] for taken in of), 3),
            "token_ms": round(1e3 * median(seconds for taken in of for seconds in taken[1:]), 3),
        }
        for name, of in times.items()
    }


def _request(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> list[float]:
    """Seconds to each token from the one before it."""
    clock, ids = _Clock(), torch.tensor([list(prompt)], device=model.device)
    config = GenerationConfig(
        do_sample=False,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=padding_id(tokenizer),
        use_cache=True,
    )
    started = _now()
    with torch.no_grad():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    return [after - before for before, after in zip([started, *clock.times], clock.times, strict=False)]


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
