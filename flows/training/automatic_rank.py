"""`method.r: auto`: a rank for each layer, found once per run by a search on training rows.

The ranks are saved beside the run's checkpoints, so that a resumed run has the same ranks.
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
    """Return the configuration with the saved ranks, or else with the ranks that a search finds.

    Args:
        params: The parameters of the run.
        config: The configuration of the adapter.
        model: The base without adapters; it does not change.
        rows: Training rows of the search.
        collate: Collator of a batch.
        folder: The run's folder, with the saved ranks.

    Raises:
        StageError: There are too few rows.
    """
    saved = folder / FILE
    search = RankSearch.from_dict(json.loads(saved.read_text(encoding="utf-8"))) if saved.exists() else None
    if search is None:
        search = _search(params, config, model, rows, collate)
        write_atomically(saved, json.dumps(asdict(search)) + "\n")
    return search.config_for(config)


def _search(
    params: Params, config: LoraConfig, model: PreTrainedModel, rows: Sequence[Row], collate: RightPaddingCollator
) -> RankSearch:
    auto, size = params.method.auto, params.train.batch_size
    needed = (auto.steps + auto.held_out) * size
    if len(rows) < needed:
        raise StageError(
            f"method.r is auto, whose search needs method.auto.steps + held_out = {auto.steps + auto.held_out} batches "
            f"of {size} rows; there are {len(rows)} training rows; lower these values, or give a rank"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(params.project.seed))[:needed].tolist()
    collated = [collate([rows[i] for i in order[first : first + size]]) for first in range(0, needed, size)]
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
