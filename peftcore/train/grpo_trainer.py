"""A Trainer for GRPO: it samples answers to prompts, and learns from their rewards.

    an optimiser step   prompts -> sampled answers -> rewards -> advantages -> loss of all answers (`grpo.py`)

The answers of a whole optimiser step are sampled before its first forward pass. With several iterations, the next
optimiser steps use the same answers. The reference of the KL term is the same model with its adapter switched off, or a
frozen adapter, so no second base is in memory.

The evaluation loss is minus the mean reward of greedy answers, so the best checkpoint has the highest reward.

Shapes: P prompts, G answers of each, E = P · G answers of one forward pass, T positions, K rewards.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer

from peftcore.errors import TrainingError
from peftcore.train.batches import WEIGHT, LengthGroupedSampler
from peftcore.train.grpo import Grpo
from peftcore.train.losses import row_sums, supervised_positions, token_losses
from peftcore.train.reference import inference_mode
from peftcore.train.reference_objective import Reference, ReferenceObjective
from peftcore.train.rewards import Rewards, RowReward
from peftcore.train.sampling import (
    ROWS,
    AnswerSampler,
    PromptCollator,
    SampledAnswer,
    Sampling,
    sampling_seed,
    supervised_batch,
)
from peftcore.train.supervised_head import supervised_logits
from peftcore.train.trainer import AdapterTrainerMixin

_LOG = logging.getLogger(__name__)

_ADVANTAGES, _OLD = "advantages", "old_log_probs"
_METRIC = "metric:"
"""Prefix of keys of a batch: values (E,) of each answer whose means are logged."""
_SUM = "sum:"
"""Prefix of metrics that are sums over the tokens of an answer."""
_INPUTS = ("input_ids", "attention_mask")


class GrpoObjective(ReferenceObjective):
    """Loss of sampled answers by their rewards.

    Args:
        trainer: The trainer that minimises this objective.
        grpo: Options of the loss.
        rewards: The rewards.
        sampler: Generation of answers.
        tokenizer: The model's tokenizer, which decodes answers.
        reference: "start" or "base"; see `ReferenceObjective`.
        ref_adapter_name: A frozen adapter that is the reference instead.
    """

    collator_name = "PromptCollator"
    examples = "sampled answers"

    def __init__(
        self,
        trainer: Any,
        grpo: Grpo,
        rewards: Rewards,
        sampler: AnswerSampler,
        tokenizer: Any,
        reference: Reference,
        ref_adapter_name: str | None,
    ) -> None:
        super().__init__(trainer, reference, ref_adapter_name)
        self.grpo = grpo
        self.rewards = rewards
        self.sampler = sampler
        self.tokenizer = tokenizer
        self._reused: list[dict[str, Tensor]] = []  # batches of the last sampling, with several iterations
        self._groups = [0, 0]  # groups, and groups of equal rewards, since the last evaluation

    @property
    def uses_reference(self) -> bool:
        """True if the loss has a KL term."""
        return self.grpo.uses_reference

    def check(self) -> None:
        """Raise TrainingError also for a sharded model, and another collator than PromptCollator."""
        super().check()
        trainer = self.trainer
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise TrainingError(
                "sampling answers needs the whole model in each process, and FSDP or DeepSpeed shards it; train "
                "without them"
            )
        if not isinstance(trainer.data_collator, PromptCollator):
            raise TrainingError(
                f"{type(trainer).__name__} samples the answers itself; give data_collator=PromptCollator(), and rows "
                "with the prompt's tokens as input_ids"
            )

    def reset(self) -> None:
        """Forget the metrics and the answers of an earlier run."""
        super().reset()
        self._reused, self._groups = [], [0, 0]

    def columns(self, signature: list[str]) -> list[str]:
        """Return all columns of the dataset, because a reward may read any."""
        return [*signature, *(getattr(self.trainer.train_dataset, "column_names", None) or ()), WEIGHT]

    def state(self) -> dict[str, Any]:
        """Return sums since the last record, counts since the last evaluation, and answers for further iterations."""
        again = self.trainer.state.global_step % self.grpo.iterations
        return super().state() | {
            "groups": list(self._groups),
            "rows_at_once": self.sampler.rows_at_once,
            "reused": self.trainer.processes.of_each(self._reused if again else []),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the values that `state` returned."""
        super().load_state(state)
        self._groups = list(state["groups"])
        self.sampler.rows_at_once = state["rows_at_once"]
        reused = state["reused"]
        if len(reused) == self.trainer.accelerator.num_processes:  # else this step samples new answers
            self._reused = reused[self.trainer.accelerator.process_index]

    # -- sampling ----------------------------------------------------------------------------------------------

    def sampled(self, batches: list[Any]) -> list[dict[str, Tensor]]:
        """Return the batches of an optimiser step with sampled answers and advantages in place of their prompts.

        They lie on the CPU; the trainer moves each of them when its turn comes. A further iteration returns the answers
        that were sampled last.
        """
        step = self.trainer.state.global_step
        if step % self.grpo.iterations and len(self._reused) == len(batches):
            return self._reused
        model, accelerator = self.trainer.adapted_model, self.trainer.accelerator
        results, values = [], []
        for part, batch in enumerate(batches):
            rows = [row for row in batch[ROWS] for _ in range(self.grpo.group_size)]
            seed = sampling_seed(self.trainer.args.seed, step, part, accelerator.process_index)
            answers, rewards = self.scored_answers(model, rows, seed)
            sequences = supervised_batch([row["input_ids"] for row in rows], answers, self.sampler.pad)
            # a row that only fills up the last round of several processes has no label, and so no weight
            counts = (batch["labels"] >= 0).all(1)
            weights = (batch[WEIGHT] * counts).repeat_interleave(self.grpo.group_size).cpu()  # as the sampled answers
            results.append(sequences | {WEIGHT: weights} | self._answer_metrics(answers, rewards))
            values.append(rewards)
        deviation = self._batch_deviation(values, results) if self.grpo.scale_rewards == "batch" else None
        for rewards, batch in zip(values, results, strict=True):
            groups = self.rewards.total(rewards).view(-1, self.grpo.group_size)
            batch[_ADVANTAGES] = self.grpo.advantages(groups, deviation).flatten().float()
            without_spread = groups.amax(1) == groups.amin(1)
            deviations = groups.std(1).float()
            for name, value in (("frac_reward_zero_std", without_spread.float()), ("reward_std", deviations)):
                batch[f"{_METRIC}{name}"] = value.repeat_interleave(self.grpo.group_size)
            self._groups[0] += len(groups)
            self._groups[1] += int(without_spread.sum())
        if self.grpo.iterations > 1:
            results = [batch | {_OLD: self._old_log_probs(batch)} for batch in results]
            self._reused = results
        return results

    def scored_answers(
        self, model: Any, rows: Sequence[Mapping[str, Any]], seed: int | None
    ) -> tuple[list[SampledAnswer], Tensor]:
        """Return an answer to each row's prompt, greedy without a seed, and the rewards (E, K) in float64."""
        with self.trainer.compute_loss_context_manager():
            split = self.trainer.faults.on_out_of_memory == "split"
            answers = self.sampler.answers(model, [row["input_ids"] for row in rows], seed, split)
        return answers, self.rewards.values(rows, [answer.text(self.tokenizer) for answer in answers])

    def _answer_metrics(self, answers: Sequence[SampledAnswer], rewards: Tensor) -> dict[str, Tensor]:
        """Return values (E,) under TRL's names; `completions/clipped_ratio` is the share of answers without an end."""
        metrics = {
            "reward": self.rewards.total(rewards).float(),
            "completions/mean_length": torch.tensor([float(len(answer.ids)) for answer in answers]),
            "completions/clipped_ratio": torch.tensor([float(not answer.ended) for answer in answers]),
        }
        for name, column in zip(self.rewards.functions, rewards.float().unbind(1), strict=True):
            metrics[f"rewards/{name}/mean"] = column
        return {f"{_METRIC}{name}": value for name, value in metrics.items()}

    def _batch_deviation(self, values: list[Tensor], batches: list[dict[str, Tensor]]) -> Tensor:
        """Return the standard deviation of the rewards of all answers that count, on all processes, a scalar."""
        rewards = torch.cat([self.rewards.total(each) for each in values])
        rewards = rewards[torch.cat([batch[WEIGHT] for batch in batches]) > 0]

        def summed(*numbers: Tensor) -> Tensor:
            on_device = torch.stack(numbers).to(self.trainer.args.device)
            return cast(Tensor, self.trainer.accelerator.reduce(on_device, "sum")).cpu()

        count, total = summed(torch.tensor(float(len(rewards))).to(rewards), rewards.sum())
        squares = summed(((rewards - total / count) ** 2).sum())[0]
        return (squares / (count - 1)).sqrt()

    def _old_log_probs(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the log-probabilities of the answers' tokens before the first update, (E, T), 0 elsewhere."""
        trainer = self.trainer
        inputs = trainer._prepare_inputs({name: batch[name] for name in (*_INPUTS, "labels")})
        rows = trainer.splitter.rows_at_once or len(inputs["labels"])
        parts = []
        for first in range(0, len(inputs["labels"]), rows):
            part = {name: tensor[first : first + rows] for name, tensor in inputs.items()}
            with trainer.compute_loss_context_manager(), inference_mode(trainer.adapted_model):
                log_probs, mask = self.log_probs(trainer.adapted_model, part)
            parts.append(log_probs.new_zeros(mask.shape).masked_scatter(mask, log_probs).cpu())
        return torch.cat(parts)

    # -- the loss ----------------------------------------------------------------------------------------------

    def log_probs(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities (n,) of the answers' tokens at the sampling temperature, and their mask (E, T).

        As in TRL, top_p does not change the distribution.
        """
        arguments, labels = {name: inputs[name] for name in _INPUTS}, inputs["labels"]
        temperature = self.sampler.sampling.temperature
        if temperature == 1:
            losses, mask = token_losses(model, arguments, labels)
            return -losses, mask
        mask = supervised_positions(labels)
        logits = supervised_logits(model, arguments, mask)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        targets = labels[:, 1:][mask[:, :-1]].to(logits.device)
        return -F.cross_entropy(logits, targets, reduction="none"), mask

    def example_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return losses (E,), and the metrics of the answers under TRL's names.

        The weighted mean of the losses, with `example_weights`, is the loss of the loss type.
        """
        reference = None
        if self.uses_reference:
            with self.reference_in_effect(model) as reference_model:
                reference, _ = self.log_probs(reference_model, inputs)
        log_probs, mask = self.log_probs(model, inputs)
        old = inputs[_OLD][mask].to(log_probs) if _OLD in inputs else log_probs.detach()
        advantages = inputs[_ADVANTAGES].to(log_probs)[:, None].expand(mask.shape)[mask]
        losses, divergences = self.grpo.token_losses(log_probs, old, advantages, reference)
        sums, counts = row_sums(losses, mask)
        limit = self.sampler.sampling.max_new_tokens if self.grpo.loss_type == "dr_grpo" else counts
        metrics = {name.removeprefix(_METRIC): value for name, value in inputs.items() if name.startswith(_METRIC)}
        of_tokens = {"clip_ratio/region_mean": self.grpo.clipped(log_probs.detach(), old, advantages).to(losses)}
        if reference is not None:
            of_tokens["kl"] = divergences.detach()
        metrics |= {f"{_SUM}{name}": row_sums(values, mask)[0] for name, values in of_tokens.items()}
        return sums / limit, metrics

    def example_weights(self, inputs: dict[str, Any]) -> Tensor:
        """Return the weights (E,) of answers: the row's weight, and for bnpo times the answer's tokens."""
        weights = super().example_weights(inputs)
        if self.grpo.loss_type == "bnpo" and ROWS not in inputs:
            weights = weights * supervised_positions(inputs["labels"]).sum(1)
        return weights

    # -- metrics -----------------------------------------------------------------------------------------------

    def record(self) -> dict[str, float]:
        """Return means over answers, and of `kl` (nats) and `clip_ratio/region_mean` over tokens, by TRL's names."""
        metrics = super().record()
        for name in [name for name in metrics if name.startswith(_SUM)]:
            metrics[name.removeprefix(_SUM)] = metrics.pop(name) / metrics["completions/mean_length"]
        return metrics

    def warn_without_spread(self) -> None:
        """Log a warning if no group since the last evaluation had different rewards; start to count anew."""
        groups = cast(Tensor, torch.tensor(self._groups, device=self.trainer.args.device))
        total, equal = cast(Tensor, self.trainer.accelerator.reduce(groups, "sum")).tolist()
        self._groups = [0, 0]
        if total and equal == total:
            _LOG.warning(
                "step %d: all %d groups since the last evaluation have equal rewards, so their advantages are 0 and "
                "nothing is learned from them; raise the temperature or the group size, give prompts that the model "
                "answers well only sometimes, or a reward with more than two values",
                *(self.trainer.state.global_step, total),
            )

    def row_metrics(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Return minus the weighted reward as `loss`, and metrics of a greedy answer to each prompt, (P,)."""
        answers, rewards = self.scored_answers(self.trainer.adapted_model, inputs[ROWS], None)
        device = inputs[WEIGHT].device
        metrics = {
            name.removeprefix(_METRIC): value.to(device)
            for name, value in self._answer_metrics(answers, rewards).items()
        }
        weights = self.example_weights(inputs)
        return {"loss": -metrics["reward"] * weights, WEIGHT: weights, **metrics}


class RepeatedSteps(Sampler[int]):
    """Indices of a sampler in blocks, each of which comes `times` times in a row; an incomplete last block is left out.

    Args:
        sampler: Row indices of an epoch.
        block: Rows of an optimiser step, on all processes.
        times: Repetitions.
    """

    def __init__(self, sampler: LengthGroupedSampler | SequentialSampler, block: int, times: int) -> None:
        self.sampler = sampler
        self.block = block
        self.times = times

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0) whose order is drawn next; the trainer calls this method."""
        if isinstance(self.sampler, LengthGroupedSampler):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler) // self.block * self.block * self.times

    def __iter__(self) -> Iterator[int]:
        indices = list(self.sampler)
        for first in range(0, len(indices) - self.block + 1, self.block):
            yield from indices[first : first + self.block] * self.times


class GrpoTrainerMixin(AdapterTrainerMixin):
    """GRPO for any Trainer class: `class MyTrainer(GrpoTrainerMixin, Trainer): ...`.

    A row is {"input_ids": token ids of the prompt} and further columns for the rewards; the collator is a
    PromptCollator, which is the default. `per_device_train_batch_size` counts prompts. The arguments are those of
    AdapterTrainerMixin and:

    Args:
        rewards: {name: function of (row, answer) to a number}; see `peftcore.train.RowReward`.
        tokenizer: The model's tokenizer.
        reward_weights: {name: factor of the reward}; 1 for a name that is left out.
        objective: Options of GRPO. None: `Grpo()`.
        sampling: How answers are sampled. None: `Sampling()`.
        end_tokens: Token ids that end an answer. None: the tokenizer's end-of-sequence token.
        reference: "start": the model as it is when the trainer is made, of which a frozen copy of the adapters is
            kept. "base": the model without adapters. Both are the same model for adapters that start at zero.
        ref_adapter_name: A frozen adapter that is the reference instead.

    Raises:
        TrainingError: The model has no next-token logits, or is sharded; the reference is trained; no end token is
            known; or too few rows for several iterations.
        ConfigError: There is no reward.
    """

    loss_is_scaled_for_ga = True
    training_objective: GrpoObjective

    def __init__(
        self,
        *args: Any,
        rewards: Mapping[str, RowReward],
        tokenizer: Any,
        reward_weights: Mapping[str, float] | None = None,
        objective: Grpo | None = None,
        sampling: Sampling | None = None,
        end_tokens: Sequence[int] | None = None,
        reference: Reference = "start",
        ref_adapter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        ends = list(end_tokens or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]))
        if not ends:
            raise TrainingError("the tokenizer has no end-of-sequence token; give end_tokens=[id]")
        pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        sampler = AnswerSampler(Sampling() if sampling is None else sampling, ends, pad)
        grpo = Grpo() if objective is None else objective
        self._grpo_options = grpo, Rewards(rewards, reward_weights), sampler, tokenizer, reference, ref_adapter_name
        kwargs.setdefault("data_collator", PromptCollator())
        super().__init__(*args, **kwargs)

    def make_objective(self) -> GrpoObjective:
        """Return the objective that samples answers and learns from their rewards."""
        return GrpoObjective(self, *self._grpo_options)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the batches of an optimiser step with sampled answers, and the sum of their weights."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = self.training_objective.sampled(batches) if batches else batches
        return batches, self._get_num_items_in_batch(batches, device)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        self.training_objective.warn_without_spread()
        return super()._evaluate(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return the sampler of AdapterTrainerMixin; with several iterations, a step's rows come again."""
        sampler, times = super()._get_train_sampler(train_dataset), self.training_objective.grpo.iterations
        if times == 1:
            return sampler
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(sampler, LengthGroupedSampler | SequentialSampler):  # equal lengths: in random order
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler = LengthGroupedSampler([1] * len(dataset), self.args.train_batch_size, seed)
        block = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes
        if len(dataset) < block:
            raise TrainingError(
                f"{times} iterations need the rows of a whole optimiser step, which are {block}, and there are "
                f"{len(dataset)}; give more rows, a smaller batch, or iterations=1"
            )
        return RepeatedSteps(sampler, block, times)


class GrpoTrainer(GrpoTrainerMixin, Trainer):
    """transformers' Trainer for a PeftModel that learns from the rewards of its own answers."""
