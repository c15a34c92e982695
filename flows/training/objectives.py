"""What `train.objective` stands for: the rows it learns from, the model it needs, and the trainer that it is.

| objective | rows (data.kind) | model | loss |
|---|---|---|---|
| sft | chat | causal | cross entropy of labelled tokens |
| dpo, orpo | preference | causal | of pairs, `peftcore.train.preference` |
| classification | classification | sequence classifier | cross entropy of classes |
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow
import pyarrow.parquet as parquet
from datasets import Dataset

from flows.data.rows import Row, read_rows
from flows.errors import StageError
from flows.params import Params
from flows.paths import Paths, Split
from peftcore import TaskType
from peftcore.train import (
    PAIR_COLUMNS,
    WEIGHT,
    AdapterTrainer,
    ClassificationCollator,
    ClassificationTrainer,
    Dpo,
    Orpo,
    PackedCollator,
    PreferenceCollator,
    PreferenceObjective,
    PreferenceTrainer,
    RightPaddingCollator,
    balanced_class_weights,
)


@dataclass(frozen=True)
class Rows:
    """Prepared rows of one kind: the columns that training reads, those of them that hold token ids, the task."""

    kind: str
    columns: tuple[str, ...]
    token_ids: tuple[str, ...]
    task: TaskType


CHATS = Rows("chat", ("input_ids", "labels"), ("input_ids",), TaskType.CAUSAL_LM)
PAIRS = Rows("preference", PAIR_COLUMNS, ("chosen_input_ids", "rejected_input_ids"), TaskType.CAUSAL_LM)
LABELLED = Rows("classification", ("input_ids", "label"), ("input_ids",), TaskType.SEQ_CLS)
ROWS_OF = {"sft": CHATS, "dpo": PAIRS, "orpo": PAIRS, "classification": LABELLED}
"""{train.objective: its rows}"""


def rows_of(params: Params) -> Rows:
    """What the parameters' objective learns from."""
    return ROWS_OF[params.train.objective]


def check_split(params: Params, path: Path) -> None:
    """Raise StageError where a split's rows are there and are damaged, or not of the objective's kind."""
    if not path.exists():
        return  # reading it says what to do
    try:
        wanted, there = rows_of(params), set(parquet.read_schema(path).names)
    except (OSError, pyarrow.ArrowException) as error:
        raise StageError(f"{path} is damaged ({error}); run the prepare stage again") from error
    if not set(wanted.columns) <= there:
        found = next((rows.kind for rows in (PAIRS, LABELLED, CHATS) if set(rows.columns) <= there), "other")
        raise StageError(
            f"train.objective is {params.train.objective}, which is for {wanted.kind} rows, and {path} holds {found} "
            f"rows; set data.kind: {wanted.kind} and run the prepare stage again, or choose another objective"
        )


def training_rows(params: Params, paths: Paths) -> dict[Split, Dataset]:
    """The train and validation rows, with their weights only where some row's is not 1."""
    splits: tuple[Split, ...] = ("train", "validation")
    columns, rows = list(rows_of(params).columns), {}
    for split in splits:
        path = paths.split(split)
        check_split(params, path)
        weighted = path.exists() and WEIGHT in parquet.read_schema(path).names
        rows[split] = Dataset.from_list(read_rows(path, [*columns, WEIGHT] if weighted else columns))
    if any(weight != 1 for each in rows.values() if WEIGHT in each.column_names for weight in each[WEIGHT]):
        return rows
    return {split: each.select_columns(columns) for split, each in rows.items()}


def merged_rows(params: Params, path: Path, limit: int) -> list[Row]:
    """The first rows of a split, to compare a merged model on: {"input_ids", "labels"}, of pairs the chosen answers.

    Of labelled texts {"input_ids", "label"}.
    """
    check_split(params, path)
    rows = read_rows(path, list(rows_of(params).columns), limit)
    return [_chosen(row) for row in rows] if rows_of(params) is PAIRS else rows


def _chosen(pair: Row) -> Row:
    return {"input_ids": pair["chosen_input_ids"], "labels": pair["chosen_labels"]}


def longest(params: Params, rows: dict[Split, Dataset]) -> int:
    """Tokens of the longest row."""
    return max(len(ids) for split in rows.values() for name in rows_of(params).token_ids for ids in split[name])


def class_names(params: Params, paths: Paths) -> list[str] | None:
    """The classes in the order of their numbers; None where the objective has none."""
    if params.train.objective != "classification":
        return None
    if not paths.labels.exists():
        raise StageError(f"there is no {paths.labels}; set data.kind: classification and run the prepare stage again")
    return cast(list[str], json.loads(paths.labels.read_text()))


def padded_collator(params: Params, pad: int) -> RightPaddingCollator:
    """What makes padded batches of the objective's rows."""
    kinds = {"chat": RightPaddingCollator, "preference": PreferenceCollator, "classification": ClassificationCollator}
    return kinds[rows_of(params).kind](pad)


def check_batching(params: Params) -> None:
    """Raise StageError where the objective's rows cannot be laid end to end."""
    if _is_packed(params) and rows_of(params) is not CHATS:
        raise StageError(
            f"train.batching is {params.train.batching}, and {params.train.objective} counts its rows one by one, so "
            "they stay apart; give grouped or padded"
        )


def training_collator(params: Params, padded: RightPaddingCollator) -> Any:
    """What makes training's batches."""
    return PackedCollator() if _is_packed(params) else padded


def _is_packed(params: Params) -> bool:
    return params.train.batching in ("padding_free", "packed")


def unweighted_chats(params: Params, rows: Dataset) -> list[Row]:
    """Rows for a search of ranks, which takes chats alone and each for the same; StageError for other rows."""
    if rows_of(params) is not CHATS:
        raise StageError(
            f"method.r is auto, whose search is for sft, and train.objective is {params.train.objective}; give a rank"
        )
    return cast(list[Row], rows.select_columns(list(CHATS.columns)).to_list())


def start_batch(params: Params, rows: list[Row], pad: int) -> dict[str, Any]:
    """The forward's arguments for some rows, for a LoRA that starts from data: of pairs, the chosen answers."""
    if rows_of(params) is PAIRS:
        rows = [_chosen(row) for row in rows]
    collate = ClassificationCollator(pad) if rows_of(params) is LABELLED else RightPaddingCollator(pad)
    return {name: tensor for name, tensor in collate(rows).items() if name != WEIGHT}


def loss_function(params: Params) -> str:
    """The test loss in words: of two runs with the same words and rows, the losses can be compared."""
    if rows_of(params) is PAIRS:
        return repr(preference_objective(params))
    return "cross entropy of classes" if rows_of(params) is LABELLED else "cross entropy of tokens"


def preference_objective(params: Params) -> PreferenceObjective:
    """The loss of pairs that the parameters ask for."""
    given = params.train.preference
    if params.train.objective == "orpo":
        return Orpo(given.beta)
    return Dpo(
        beta=given.beta,
        loss=given.loss,
        label_smoothing=given.label_smoothing,
        length_normalized=given.length_normalized,
        rpo_alpha=given.rpo_alpha,
    )


def trainer_of(params: Params, rows: Dataset, labels: list[str] | None) -> tuple[type[AdapterTrainer], dict[str, Any]]:
    """The trainer's class, and what it takes beside AdapterTrainer's arguments; rows: of training."""
    if rows_of(params) is PAIRS:
        options: dict[str, Any] = {
            "objective": preference_objective(params),
            "reference": "base",  # which the test rows are judged against, also if training goes on from an adapter
            "precompute_reference": params.train.preference.precompute_reference,
        }
        return cast(type[AdapterTrainer], PreferenceTrainer), options
    if labels is not None:
        balanced = params.train.classification.class_weights == "balanced"
        weights = balanced_class_weights(rows["label"], len(labels)) if balanced else None
        return cast(type[AdapterTrainer], ClassificationTrainer), {"class_weights": weights}
    return AdapterTrainer, {}
