"""Search of a rank for each layer by a short LoRA training.

A LoRA of twice the rank is trained for a few steps. The reduction of the loss on held-out rows is attributed to the
singular components of the layers' updates (`peftcore.train.rank_attribution`). The parameter budget goes to the
components with the largest reduction per parameter (`peftcore.train.rank_allocation`).
"""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from tqdm import tqdm

from peftcore.bases import base_weight
from peftcore.bases.quantized import keep_quantized_weights_trainable
from peftcore.errors import ConfigError, TrainingError
from peftcore.injection import inject, merge
from peftcore.injection.adapter_set import ATTRIBUTE, adapter_set
from peftcore.injection.targets import find_targets
from peftcore.layers.training_flags import training_flags_restored
from peftcore.methods.lora import Lora, LoraConfig
from peftcore.train.model_loss import ModelLossCheck
from peftcore.train.rank_allocation import allocate_ranks
from peftcore.train.rank_attribution import (
    Batch,
    attribute_loss,
    mean_loss,
    scaled,
    summed_loss,
    to_singular_directions,
)

NAME = "rank_search"
"""The adapter's name while the search runs."""
WIDER = 2
"""Ratio of the search's rank, which is the largest rank of a layer, to the configuration's rank."""
STEPS_DOWN = 2**0.5
"""Ratio of successive budgets that are tried for a tolerance."""


@dataclass(frozen=True)
class Rung:
    """One budget tried for a tolerance, and the loss of the search's adapter pruned to this budget."""

    parameters: int
    loss: float


@dataclass(frozen=True)
class RankSearch:
    """Result of a rank search. Losses are means over `held_out`, in nats."""

    ranks: dict[str, int]
    """{path: rank}; 0: the layer gets no adapter."""
    scores: dict[str, list[float]]
    """{path: reduction of the loss in nats by each singular component, largest singular value first}."""
    singular_values: dict[str, list[float]]
    parameters: int
    """Parameters of a LoRA with these ranks (count)."""
    loss_before: float
    """Loss without the search's adapter."""
    loss_after: float
    """Loss with the whole search's adapter."""
    ladder: list[Rung]
    """Budgets tried for a tolerance, the largest first."""
    seconds: float

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "RankSearch":
        """Return the result that `dataclasses.asdict` has turned into `fields`."""
        return cls(**{**fields, "ladder": [Rung(**rung) for rung in fields["ladder"]]})

    def config_for(self, config: LoraConfig) -> LoraConfig:
        """Return the configuration with these ranks and an unchanged scaling of every layer.

        The scaling is α/r, or α/√r with rsLoRA. Layers of rank 0 are not targeted.
        """
        return dataclasses.replace(config, rank_pattern={}, alpha_pattern={}).with_ranks(self.ranks)


def find_ranks(
    model: nn.Module,
    config: LoraConfig,
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    *,
    budget: int | None = None,
    tolerance: float | None = None,
    least: int = 1,
    multiple: int | None = None,
    learning_rate: float = 5e-4,
    max_grad_norm: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> RankSearch:
    """Search a rank for each layer that `config` targets. The model is left unchanged.

    The same arguments and seed give the same ranks. The caller's random state is not changed.

    Args:
        model: A model without adapters.
        config: The LoRA whose ranks are searched.
        batches: Training batches; each is one optimiser step.
        held_out: Other batches, which attribute the loss. Do not use rows of the final evaluation.
        budget: Parameters of all factors (count). None: those of `config` with rank r at every layer.
        tolerance: Instead of a budget, the relative increase of the loss that is allowed: the smallest budget within
            it is chosen. It is measured by pruning the search's adapter; training at that budget gives a lower loss.
        least: Lowest rank of a layer.
        multiple: Ranks are multiples of this number, or the layer's largest rank. None: a quarter of r, at most 8.
            With arbitrary ranks, CPU training took 1.4 times as long, because kernels were compiled again and again.
        learning_rate: AdamW's learning rate per step, which falls linearly to zero.
        max_grad_norm: Norm to which gradients are clipped.
        seed: Seed of the search.
        progress: Show a progress bar.

    Raises:
        ConfigError: An option does not fit the search.
        TrainingError: The loss is not finite.
    """
    multiple = max(1, min(8, config.r // 4)) if multiple is None else multiple
    _check(model, config, batches, held_out, budget, tolerance, least, multiple)
    started, frozen = time.perf_counter(), [(p, p.requires_grad) for p in model.parameters()]
    check = ModelLossCheck()
    layers = {path: base_weight(layer, path) for path, layer in find_targets(model, config).items()}
    if odd := [path for path, base in layers.items() if base.kind != "linear"]:
        raise ConfigError(f"find_ranks supports linear layers only; exclude {odd[0]}")
    costs = {path: base.in_features + base.out_features for path, base in layers.items()}
    widest = {path: min(WIDER * config.r, b.in_features, b.out_features) for path, b in layers.items()}
    device = next(model.parameters()).device
    random_numbers = torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)
    with random_numbers, training_flags_restored(model):
        torch.manual_seed(seed)
        inject.inject_untrained(model, _search_config(config, widest), NAME)
        try:
            adapters = cast(dict[str, Lora], adapter_set(model).of_method(NAME))
            scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
            for adapter in adapters.values():
                adapter.scaling = scaling
            keep_quantized_weights_trainable(model)
            bar = tqdm(total=len(batches) + 2 * len(held_out), desc="ranks", unit="batch", disable=not progress)
            _train(model, batches, check, learning_rate, max_grad_norm, bar)
            model.eval()
            values = {path: to_singular_directions(adapter) for path, adapter in adapters.items()}
            scores = attribute_loss(model, adapters, held_out, check, bar.update)
            bar.close()
            with scaled(adapters, 0.0):
                before = mean_loss(model, held_out, check)
            after = mean_loss(model, held_out, check)
            if not math.isfinite(after):
                raise TrainingError(f"the search's loss is {after}; lower learning_rate, which is {learning_rate}")
            plain = {path: score.tolist() for path, score in scores.items()}
            if tolerance is None:
                ladder: list[Rung] = []
                whole = config.r * sum(costs.values())
                ranks = allocate_ranks(plain, costs, whole if budget is None else budget, least, multiple)
            else:
                most = after * (1 + tolerance)
                ranks, ladder = _least_within(model, adapters, plain, costs, held_out, check, most, least, multiple)
        finally:
            merge.unload(model)
            for parameter, requires_grad in frozen:
                parameter.requires_grad_(requires_grad)
    return RankSearch(
        ranks=ranks,
        scores=plain,
        singular_values={path: value.tolist() for path, value in values.items()},
        parameters=_parameters(ranks, costs),
        loss_before=before,
        loss_after=after,
        ladder=ladder,
        seconds=time.perf_counter() - started,
    )


def _check(
    model: nn.Module,
    config: LoraConfig,
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    budget: int | None,
    tolerance: float | None,
    least: int,
    multiple: int,
) -> None:
    if ATTRIBUTE in model.__dict__:
        raise ConfigError("find_ranks needs a model without adapters; call it before get_peft_model")
    if config.rank_pattern or config.alpha_pattern:
        raise ConfigError("find_ranks computes rank_pattern and alpha_pattern; remove them from the configuration")
    if config.layer_replication or config.target_parameters:
        raise ConfigError("find_ranks does not support layer_replication or target_parameters; remove them")
    if not batches or not held_out:
        raise ConfigError(f"find_ranks needs batches and held-out batches; got {len(batches)} and {len(held_out)}")
    if budget is not None and tolerance is not None:
        raise ConfigError("find_ranks takes a budget or a tolerance, not both")
    for option, ranks, smallest in (("least", least, 0), ("multiple", multiple, 1)):
        if not isinstance(ranks, int) or ranks < smallest:
            raise ConfigError(f"find_ranks: {option} must be an integer, at least {smallest}; got {ranks!r}; try 1")
    if tolerance is not None and not tolerance > 0:
        raise ConfigError(f"find_ranks: tolerance must be above 0, relative to the loss; got {tolerance}; try 0.01")


def _search_config(config: LoraConfig, ranks: dict[str, int]) -> LoraConfig:
    """Return plain LoRA at the same layers; initialisation and variants do not matter for the choice of ranks."""
    return LoraConfig(
        task_type=config.task_type,
        target_modules=sorted(ranks),
        modules_to_save=config.modules_to_save,
        lora_dropout=config.lora_dropout,
        rank_pattern=ranks,
    )


# -- training --------------------------------------------------------------------------------------------------------


def _train(
    model: nn.Module, batches: Sequence[Batch], check: ModelLossCheck, rate: float, max_norm: float, bar: Any
) -> None:
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / len(batches))
        total, count = summed_loss(model, batch, check)
        (total / count).backward()
        nn.utils.clip_grad_norm_(trained, max_norm)
        optimizer.step()
        optimizer.zero_grad()
        bar.update()


# -- a tolerance -----------------------------------------------------------------------------------------------------


def _least_within(
    model: nn.Module,
    adapters: Mapping[str, Lora],
    scores: Mapping[str, list[float]],
    costs: Mapping[str, int],
    held_out: Sequence[Batch],
    check: ModelLossCheck,
    allowed: float,
    least: int,
    multiple: int,
) -> tuple[dict[str, int], list[Rung]]:
    """Return the ranks of the smallest budget at which the pruned adapter's loss is at most `allowed`.

    Budgets are tried from the search's own downwards, until the loss exceeds `allowed`.
    """
    ranks = {path: len(pieces) for path, pieces in scores.items()}
    lowest = -(-least // multiple) * multiple
    floor = sum(min(lowest, len(pieces)) * costs[path] for path, pieces in scores.items())
    factors = {path: a.lora_B_weight.detach().clone() for path, a in adapters.items()}
    budget, ladder = float(_parameters(ranks, costs)), []
    while (budget := budget / STEPS_DOWN) >= floor:
        fewer = allocate_ranks(scores, costs, int(budget), least, multiple)
        with torch.no_grad():
            for path, adapter in adapters.items():
                best = torch.tensor(scores[path]).argsort(descending=True, stable=True)[fewer[path] :]
                adapter.lora_B_weight.copy_(factors[path]).index_fill_(1, best.to(adapter.lora_B_weight.device), 0.0)
        ladder.append(Rung(_parameters(fewer, costs), mean_loss(model, held_out, check)))
        if ladder[-1].loss > allowed:
            break
        ranks = fewer
    return ranks, ladder


def _parameters(ranks: Mapping[str, int], costs: Mapping[str, int]) -> int:
    return sum(rank * costs[path] for path, rank in ranks.items())
