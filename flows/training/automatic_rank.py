"""`method.r: auto`: a rank for each layer by a search on training rows, once for a run.

What the search found is kept beside the run's checkpoints, so that an interrupted run goes on with the same ranks.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel

from flows.data.rows import Row
from flows.errors import StageError
from flows.params import Params
from peftcore import LoraConfig
from peftcore.files import write_atomically
from peftcore.train import RankSearch, RightPaddingCollator, find_ranks

FILE = "ranks.json"


def with_automatic_ranks(
    params: Params,
    config: LoraConfig,
    model: PreTrainedModel,
    rows: Sequence[Row],
    collate: RightPaddingCollator,
    folder: Path,
) -> LoraConfig:
    """The configuration with the ranks that `folder` holds, or else with those that a search on `rows` finds.

    model: the base without adapters; it stays as it is. Raises StageError where there are too few rows to search on.
    """
    kept = folder / FILE
    search = RankSearch.from_dict(json.loads(kept.read_text())) if kept.exists() else None
    if search is None:
        search = _search(params, config, model, rows, collate)
        write_atomically(kept, json.dumps(asdict(search)) + "\n")
    return search.config_for(config)


def _search(
    params: Params, config: LoraConfig, model: PreTrainedModel, rows: Sequence[Row], collate: RightPaddingCollator
) -> RankSearch:
    auto, size = params.method.auto, params.train.batch_size
    wanted = (auto.steps + auto.held_out) * size
    if len(rows) < wanted:
        raise StageError(
            f"method.r is auto, whose search takes method.auto.steps + held_out = {auto.steps + auto.held_out} batches "
            f"of {size} rows; there are {len(rows)} training rows; lower these or give a rank"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(params.project.seed))[:wanted].tolist()
    collated = [collate([rows[i] for i in order[first : first + size]]) for first in range(0, wanted, size)]
    batches = [{name: tensor.to(model.device) for name, tensor in batch.items()} for batch in collated]
    return find_ranks(
        model,
        config,
        batches[: auto.steps],
        batches[auto.steps :],
        tolerance=auto.tolerance,
        least=auto.least,
        learning_rate=params.train.learning_rate,
        max_grad_norm=params.train.max_grad_norm,
        seed=params.project.seed,
    )
