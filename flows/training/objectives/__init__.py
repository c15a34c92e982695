"""Training objectives: the rows, model and trainer of each `train.objective`.

| objective | rows (data.kind) | model | loss |
|---|---|---|---|
| sft | chat, text | causal | cross entropy of supervised tokens; with a teacher also `peftcore.train.distillation` |
| dpo, orpo, simpo | preference | causal | preference loss, `peftcore.train.preference` |
| kto | unpaired_preference | causal | KTO loss, `peftcore.train.kto` |
| grpo | chat | causal | rewards of generated answers, `peftcore.train.grpo`; the test loss is that of sft |
| classification | classification | sequence classifier | cross entropy of classes |
| token_classification | token_classification | token classifier | cross entropy of tags |
| seq2seq | seq2seq | encoder-decoder | cross entropy of target tokens |
| reward | preference | sequence classifier of one output | Bradley-Terry loss, `peftcore.train.reward` |
| embedding | retrieval | without a head | contrastive loss, `peftcore.train.embedding` |
| reranker | retrieval | sequence classifier, one output | cross entropy of passages, `peftcore.train.reranking` |

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
from flows.training.objectives.embedding import Embedding
from flows.training.objectives.grpo import GroupRelativePolicy
from flows.training.objectives.kto import UnpairedPreference, kto_objective
from flows.training.objectives.objective import Objective, Rows, Trainer
from flows.training.objectives.preference import Preference, preference_objective
from flows.training.objectives.reranker import Reranker
from flows.training.objectives.reward import REWARD, Reward, reward_objective
from flows.training.objectives.sequence_to_sequence import SequenceToSequence
from flows.training.objectives.sft import SupervisedFinetuning, distillation_of
from flows.training.objectives.token_classification import TokenClassification
from peftcore.train import WEIGHT, PackedCollator, RightPaddingCollator

__all__ = [
    "OBJECTIVES",
    "REWARD",
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
    "model_outputs",
    "objective_of",
    "padded_collator",
    "preference_objective",
    "reward_objective",
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
    "grpo": GroupRelativePolicy(),
    "classification": Classification(),
    "token_classification": TokenClassification(),
    "seq2seq": SequenceToSequence(),
    "reward": Reward(),
    "embedding": Embedding(),
    "reranker": Reranker(),
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
    objective, rows = objective_of(params), {}
    for split in splits:
        path = paths.split(split)
        check_split(params, path)
        present = parquet.read_schema(path).names if path.exists() else []
        columns = [name for name in objective.columns(present) if name != WEIGHT]
        weighted = [WEIGHT] if WEIGHT in present else []
        complete = objective.complete_rows(params, paths.base, read_rows(path, [*columns, *weighted]))
        rows[split] = Dataset.from_list(objective.training_rows(complete))
    weighted = {split: each for split, each in rows.items() if WEIGHT in each.column_names}
    if any(weight != 1 for each in weighted.values() for weight in each[WEIGHT]):
        return rows
    return rows | {split: each.remove_columns(WEIGHT) for split, each in weighted.items()}


def merged_rows(params: Params, path: Path, limit: int) -> list[Row]:
    """Return the first rows of a split for comparing a merged model: {"input_ids", "labels"}.

    Preference pairs give their chosen answers; labelled texts give {"input_ids", "label"}. The labels of tagged words
    are indices of tags.
    """
    check_split(params, path)
    return [objective_of(params).model_row(row) for row in read_rows(path, list(rows_of(params).columns), limit)]


def longest(params: Params, rows: dict[Split, Dataset]) -> int:
    """Return the tokens of the longest row, with those that training generates behind it."""
    objective = objective_of(params)
    return max(objective.longest(split) for split in rows.values()) + objective.new_tokens(params)


def class_names(params: Params, paths: Paths) -> list[str] | None:
    """Return the names of the classes, or of a reward model's output, by index; None for a language model."""
    if outputs := objective_of(params).outputs:
        return list(outputs)
    if not objective_of(params).has_classes:
        return None
    if not paths.labels.exists():
        raise StageError(
            f"there is no {paths.labels}; set data.kind: {rows_of(params).kind} and run `peftcore stage prepare` again"
        )
    return cast(list[str], json.loads(paths.labels.read_text(encoding="utf-8")))


def model_outputs(params: Params, paths: Paths) -> list[str] | None:
    """Return the names of the head's outputs: the classes, or what the objective says.

    [] for a model without a head, None for a language model.
    """
    outputs = objective_of(params).outputs
    return class_names(params, paths) if outputs is None else list(outputs)


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
    if params.train.objective != "sft":
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
