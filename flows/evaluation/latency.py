"""Latency of a single request: time to the first token, and time per further token.

Decoding is greedy with batch size 1 and a key-value cache, and each request generates the same number of tokens. The
first request is a warm-up. Base and adapter alternate, so that other load on the machine affects both. The results are
medians, which are robust to pauses.
"""

import contextlib
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from flows.base.folder import padding_id
from flows.evaluation.generation import contiguous_head
from flows.runtime.progress import progress

NEW_TOKENS = 16
"""Tokens that each request generates."""


class _Clock(StoppingCriteria):
    """Stopping criterion that records the time of each token and never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        self.times.append(_now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def measure_latency(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]]
) -> dict[str, dict[str, float]]:
    """Return {"base", "adapter"} -> {"first_token_ms", "token_ms"}.

    Args:
        model: A PeftModel, unmerged.
        tokenizer: The base's tokenizer.
        prompts: Token ids of each prompt.
    """
    times: dict[str, list[list[float]]] = {"base": [], "adapter": []}
    with contiguous_head(model), progress(2 * (len(prompts) + 1), "latency", "request") as bar:
        for number, prompt in enumerate([prompts[0], *prompts]):
            for name, context in (("base", model.disable_adapter()), ("adapter", contextlib.nullcontext())):
                with context:
                    seconds = _request(model, tokenizer, prompt)
                if number > 0:
                    times[name].append(seconds)
                bar.update(1)
    return {
        name: {
            "first_token_ms": round(1e3 * median(request[0] for request in requests), 3),
            "token_ms": round(1e3 * median(token for request in requests for token in request[1:]), 3),
        }
        for name, requests in times.items()
    }


def _request(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> list[float]:
    """Return the seconds of each token since the one before."""
    clock, ids = _Clock(), torch.tensor([list(prompt)], device=model.device)
    config = GenerationConfig(
        do_sample=False,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=padding_id(tokenizer),
        use_cache=True,
        decoder_start_token_id=getattr(model.generation_config, "decoder_start_token_id", None),
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
