"""Training objectives: the rows, model and trainer of each `train.objective`.

| objective | rows (data.kind) | model | loss |
|---|---|---|---|
| sft | chat, text | causal | cross entropy of supervised tokens; with a teacher also `peftcore.train.distillation` |
| dpo, orpo, simpo | preference | causal | preference loss, `peftcore.train.preference` |
| kto | unpaired_preference | causal | KTO loss, `peftcore.train.kto` |
| classification | classification | sequence classifier | cross entropy of classes |

Each has a file with a subclass of `Objective`. The stages call the functions of this module.
"""

import json
from pathlib import Path
from typing import Any, cast

import pyarrow
import pyarrow.parquet as parquet
from datasets import Dataset

from flows.data.rows import Row, read_rows
from flows.errors import StageError
from flows.params import Params
from flows.paths import Paths, Split
from flows.training.objectives.classification import Classification
from flows.training.objectives.kto import UnpairedPreference, kto_objective
from flows.training.objectives.objective import Objective, Rows, Trainer
from flows.training.objectives.preference import Preference, preference_objective
from flows.training.objectives.sft import SupervisedFinetuning, distillation_of
from peftcore.train import WEIGHT, PackedCollator, RightPaddingCollator

__all__ = [
    "OBJECTIVES",
    "Objective",
    "Rows",
    "Trainer",
    "check_batching",
    "check_split",
    "class_names",
    "distillation_of",
    "kto_objective",
    "longest",
    "loss_function",
    "merged_rows",
    "objective_of",
    "padded_collator",
    "preference_objective",
    "rows_of",
    "start_batch",
    "start_rows",
    "trainer_of",
    "training_collator",
    "training_rows",
    "unweighted_chats",
]

OBJECTIVES: dict[str, Objective] = {
    "sft": SupervisedFinetuning(),
    "dpo": Preference(),
    "orpo": Preference(),
    "simpo": Preference(),
    "kto": UnpairedPreference(),
    "classification": Classification(),
}
"""{train.objective: its rows, loss and trainer}"""


def objective_of(params: Params) -> Objective:
    """Return the parameters' objective."""
    return OBJECTIVES[params.train.objective]


def rows_of(params: Params) -> Rows:
    """Return the rows of the parameters' objective."""
    return objective_of(params).rows


def check_split(params: Params, path: Path) -> None:
    """Raise StageError if a split's file is damaged or holds rows of another kind; an absent file passes."""
    if not path.exists():
        return  # reading the split reports it
    try:
        expected, columns = rows_of(params), set(parquet.read_schema(path).names)
    except (OSError, pyarrow.ArrowException) as error:
        raise StageError(f"{path} is damaged ({error}); run `peftcore stage prepare` again") from error
    kinds = sorted({objective.rows for objective in OBJECTIVES.values()}, key=lambda rows: -len(rows.columns))
    kind = next((rows.kind for rows in kinds if set(rows.columns) <= columns), "other")  # most columns first
    if kind != expected.kind:
        raise StageError(
            f"train.objective is {params.train.objective}, which needs {expected.kind} rows, and {path} holds {kind} "
            f"rows; set data.kind: {expected.kind} and run `peftcore stage prepare` again, or choose another objective"
        )


def training_rows(params: Params, paths: Paths) -> dict[Split, Dataset]:
    """Return the train and validation rows, with a weight column only if some weight is not 1."""
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
    """Return the first rows of a split for comparing a merged model: {"input_ids", "labels"}.

    Preference pairs give their chosen answers; labelled texts give {"input_ids", "label"}.
    """
    check_split(params, path)
    return [objective_of(params).model_row(row) for row in read_rows(path, list(rows_of(params).columns), limit)]


def longest(params: Params, rows: dict[Split, Dataset]) -> int:
    """Return the tokens of the longest row."""
    return max(len(ids) for split in rows.values() for name in rows_of(params).token_ids for ids in split[name])


def class_names(params: Params, paths: Paths) -> list[str] | None:
    """Return the class names by index; None if the objective has no classes."""
    if not objective_of(params).has_classes:
        return None
    if not paths.labels.exists():
        raise StageError(
            f"there is no {paths.labels}; set data.kind: {rows_of(params).kind} and run `peftcore stage prepare` again"
        )
    return cast(list[str], json.loads(paths.labels.read_text()))


def padded_collator(params: Params, pad: int, longest_row: int) -> RightPaddingCollator:
    """Return the collator of padded batches of the objective's rows. longest_row: its length in tokens."""
    return objective_of(params).collator(pad, longest_row)


def check_batching(params: Params) -> None:
    """Raise StageError if the objective's rows cannot be concatenated."""
    if _is_packed(params) and not objective_of(params).packed:
        raise StageError(
            f"train.batching is {params.train.batching}, and {params.train.objective} needs its rows one by one; "
            "give grouped or padded"
        )


def training_collator(params: Params, padded: RightPaddingCollator) -> Any:
    """Return the collator of training batches."""
    return PackedCollator() if _is_packed(params) else padded


def _is_packed(params: Params) -> bool:
    return params.train.batching in ("padding_free", "packed")


def unweighted_chats(params: Params, rows: Dataset) -> list[Row]:
    """Return chat rows without weights for the search of ranks. Raises StageError for rows of another kind."""
    if rows_of(params).kind != "chat":
        raise StageError(
            f"method.r is auto, whose search supports sft only, and train.objective is {params.train.objective}; give "
            "a rank"
        )
    return cast(list[Row], rows.select_columns(list(rows_of(params).columns)).to_list())


def start_rows(params: Params, rows: Dataset, count: int) -> list[Row]:
    """Return at most `count` training rows for a data-driven initialisation; of marked answers the desirable ones."""
    rows = objective_of(params).start_rows(rows)
    return [rows[number] for number in range(min(len(rows), count))]


def start_batch(params: Params, rows: list[Row], pad: int) -> dict[str, Any]:
    """Return the forward's arguments for a data-driven initialisation; of pairs the chosen answers."""
    return objective_of(params).start_batch(rows, pad)


def loss_function(params: Params) -> str:
    """Return a description of the test loss; losses of two runs are comparable if descriptions and rows are equal."""
    return objective_of(params).loss_function(params)


def trainer_of(params: Params, rows: Dataset, labels: list[str] | None, teacher: Any = None) -> Trainer:
    """Return the trainer's class, and its arguments besides AdapterTrainer's.

    Args:
        params: The parameters of the run.
        rows: Training rows.
        labels: Names of the classes, if the objective has classes.
        teacher: A model to distil from; None with a teacher in the parameters: the base.
    """
    return objective_of(params).trainer(params, rows, labels, teacher)
