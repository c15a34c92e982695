"""aLoRA: the adapter acts from the last place where its invocation tokens stand. arXiv:2504.12397.

Everything before is the base's own computation, so its cache entries serve every adapter.
"""

from typing import Any

import torch
from torch import Tensor

from peftcore._util.per_thread import PerThread
from peftcore.adapter import Shared


class Invocation(Shared):
    """How many last positions of each row the adapter acts at, in the forward that runs now; None: nowhere."""

    last_positions = PerThread()
    """(b,)"""


def mask(shared: Invocation, h: Tensor) -> Tensor:
    """1 where the adapter acts, for h (b, t, r)."""
    positions = torch.arange(h.shape[-2], device=h.device)
    if shared.last_positions is None:
        return torch.zeros_like(positions, dtype=h.dtype)[:, None]
    acts = positions >= h.shape[-2] - shared.last_positions.to(h.device)[:, None]  # (b, t)
    return acts[..., None].to(h.dtype)


def locate(shared: Invocation, tokens: list[int], inputs: dict[str, Any]) -> None:
    """Find the invocation in each row, or take `alora_offsets`; a decoding step goes on as its prompt began."""
    ids, given = inputs.get("input_ids"), inputs.get("alora_offsets")
    tokens_in = next((inputs[k] for k in ("input_ids", "inputs_embeds") if inputs.get(k) is not None), None)
    if given is not None:
        positions = torch.as_tensor([0 if n is None else int(n) for n in given])
        beams = 1 if tokens_in is None else len(tokens_in) // len(positions)  # those of a row lie together
        shared.last_positions = positions.repeat_interleave(beams)
        return
    if tokens_in is None:
        return
    cache = inputs.get("cache", inputs.get("past_key_values"))
    if cache is not None and cache.get_seq_length() > 0 and shared.last_positions is not None:
        shared.last_positions = (shared.last_positions > 0) * tokens_in.shape[1]
        return
    shared.last_positions = None if ids is None else _last_positions(ids, tokens)


def _last_positions(ids: Tensor, tokens: list[int]) -> Tensor:
    """(b,): positions from the start of the last occurrence of `tokens` to the row's end; 0 where there is none."""
    wanted = torch.tensor(tokens, device=ids.device)
    if ids.shape[1] < len(wanted):
        return torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    found = (ids.unfold(1, len(wanted), 1) == wanted).all(-1)  # (b, t − n + 1)
    starts = torch.arange(found.shape[1], device=ids.device)
    distance = torch.where(found, ids.shape[1] - starts, ids.shape[1] + 1).amin(1)
    return torch.where(found.any(1), distance, 0)
