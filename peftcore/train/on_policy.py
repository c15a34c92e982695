"""On-policy distillation (GKD), arXiv:2306.13649: the student samples the answers on which it learns from the teacher.

A share λ of the batches gets answers that the student samples to the batch's prompts. There the loss is the divergence
from the teacher alone; the other batches keep the answers of their rows, and their cross entropy.

Shapes: B rows, T positions.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peftcore.errors import ConfigError
from peftcore.train.batches import WEIGHT
from peftcore.train.losses import IGNORED
from peftcore.train.sampling import AnswerSampler, Sampling, sampling_seed, supervised_batch

SAMPLED = "sampled"
"""Key of a batch: 1 for rows whose answers the student sampled, else 0, (B, 1)."""


@dataclass(frozen=True)
class OnPolicy:
    """Share of the batches with sampled answers, and how these are sampled.

    Raises:
        ConfigError: A value is out of range.
    """

    end_tokens: Sequence[int]
    """Token ids that end an answer, at least one."""
    share: float = 0.5
    """Share of the batches, λ, above 0 and at most 1."""
    sampling: Sampling = field(default_factory=Sampling)
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        if not self.end_tokens:
            raise ConfigError("end_tokens is empty; give at least one token id that ends an answer")
        if not 0 < self.share <= 1:
            raise ConfigError(f"share must be above 0 and at most 1; got {self.share}")

    def sampled(self, trainer: Any, batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the batches of an optimiser step, a share of them with sampled answers.

        Which batches and which answers depends on the run's seed and the step alone.

        Args:
            trainer: An `AdapterTrainerMixin`.
            batches: Batches of a RightPaddingCollator.
        """
        sampler = AnswerSampler(self.sampling, self.end_tokens, self.pad_token_id)
        step, process = trainer.state.global_step, trainer.accelerator.process_index
        results = []
        for part, batch in enumerate(batches):
            seed = sampling_seed(trainer.args.seed, step, part, process)
            chosen = random.Random(seed).random() < self.share
            if not chosen or not bool((batch["labels"] != IGNORED).any(1).all()):  # a row without labels has no prompt
                results.append({**batch, SAMPLED: torch.zeros(len(batch["labels"]), 1)})
                continue
            with trainer.compute_loss_context_manager():
                split = trainer.faults.on_out_of_memory == "split"
                answers = sampler.answers(trainer.adapted_model, prompts := prompts_of(batch), seed, split)
            rows: dict[str, Any] = supervised_batch(prompts, answers, self.pad_token_id)
            rows[SAMPLED] = torch.ones(len(prompts), 1)
            results.append(rows | ({WEIGHT: batch[WEIGHT].cpu()} if WEIGHT in batch else {}))
        return results


def prompts_of(batch: Mapping[str, Tensor]) -> list[list[int]]:
    """Return the tokens of each row before its first supervised token."""
    starts = (batch["labels"] != IGNORED).int().argmax(1).tolist()
    return [ids[:start].tolist() for ids, start in zip(batch["input_ids"], starts, strict=True)]
