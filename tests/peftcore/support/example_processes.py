"""Trainings on weighted pairs that one process and a group of them do alike, for tests of several processes.

Seven rows in batches of two do not come out even: one process fills up the last round.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from process_groups import fresh_state
from quiet_training import trained
from tiny_pairs import adapted, pairs, trainer

from peftcore.train import Dpo, Orpo

WEIGHTS = [1.0, 0.5, 2.0, 1.0, 0.0, 3.0, 1.0]
CASES: dict[str, dict[str, Any]] = {
    "dpo": {"objective": Dpo(beta=0.5, rpo_alpha=0.1)},
    "dpo, reference taken once": {"objective": Dpo(beta=0.5), "precompute_reference": True},
    "orpo": {"objective": Orpo(beta=0.5)},
}


def outcome(name: str, folder: Path, accumulation: int) -> dict[str, Any]:
    """Six steps in float64 with `accumulation` forward passes each, and an evaluation after them."""
    model = adapted().double()
    options = {"gradient_accumulation_steps": accumulation, "per_device_eval_batch_size": 2, "max_steps": 6}
    made = trainer(model, folder, pairs(7, WEIGHTS), **options, **CASES[name])
    made.train()
    metrics = made.evaluate()
    records = [record for record in made.state.log_history if "rewards/margins" in record]
    return {
        "losses": [record["loss"] for record in records],
        "margins": [record["rewards/margins"] for record in records],
        "adapter": trained(model),
        "evaluation": torch.tensor([metrics["eval_loss"], metrics["eval_rewards/margins"]]),
    }


def all_outcomes(folder: Path) -> dict[str, dict[str, Any]]:
    """Each case in one process of a group."""
    found = {}
    for name in CASES:
        with fresh_state():
            found[name] = outcome(name, folder / f"{name} {dist.get_rank()}", 2)
    return found
