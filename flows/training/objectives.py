"""Training objectives: the rows, model and trainer of each `train.objective`.

| objective | rows (data.kind) | model | loss |
|---|---|---|---|
| sft | chat, text | causal | cross entropy of supervised tokens; with a teacher also `peftcore.train.distillation` |
| dpo, orpo, simpo | preference | causal | preference loss, `peftcore.train.preference` |
| kto | unpaired_preference | causal | KTO loss, `peftcore.train.kto` |
| classification | classification | sequence classifier | cross entropy of classes |
"""

import json
import logging
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
    REWARD_COLUMNS,
    UNPAIRED_COLUMNS,
    WEIGHT,
    AdapterTrainer,
    BradleyTerry,
    ClassificationCollator,
    ClassificationTrainer,
    Distillation,
    DistillationTrainer,
    Dpo,
    Kto,
    KtoTrainer,
    Orpo,
    PackedCollator,
    PreferenceCollator,
    PreferenceObjective,
    PreferenceTrainer,
    RewardCollator,
    RewardTrainer,
    RightPaddingCollator,
    SimPo,
    UnpairedPreferenceCollator,
    balanced_class_weights,
    kto_weight_range,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """Prepared rows of one kind: the columns that training reads, those with token ids, and the task."""

    kind: str
    columns: tuple[str, ...]
    token_ids: tuple[str, ...]
    task: TaskType


CHATS = Rows("chat", ("input_ids", "labels"), ("input_ids",), TaskType.CAUSAL_LM)
PAIRS = Rows("preference", PAIR_COLUMNS, ("chosen_input_ids", "rejected_input_ids"), TaskType.CAUSAL_LM)
ANSWERS = Rows("unpaired_preference", UNPAIRED_COLUMNS, ("input_ids",), TaskType.CAUSAL_LM)
RANKED = Rows("preference", REWARD_COLUMNS, REWARD_COLUMNS, TaskType.SEQ_CLS)
REWARD = "reward"
LABELLED = Rows("classification", ("input_ids", "label"), ("input_ids",), TaskType.SEQ_CLS)
ROWS_OF = {
    "sft": CHATS,
    "dpo": PAIRS,
    "orpo": PAIRS,
    "simpo": PAIRS,
    "kto": ANSWERS,
    "classification": LABELLED,
    "reward": RANKED,
}
"""{train.objective: its rows}"""


def rows_of(params: Params) -> Rows:
    """Return the rows of the parameters' objective."""
    return ROWS_OF[params.train.objective]


def check_split(params: Params, path: Path) -> None:
    """Raise StageError if a split's file is damaged or holds rows of another kind; an absent file passes."""
    if not path.exists():
        return  # reading the split reports it
    try:
        expected, columns = rows_of(params), set(parquet.read_schema(path).names)
    except (OSError, pyarrow.ArrowException) as error:
        raise StageError(f"{path} is damaged ({error}); run `peftcore stage prepare` again") from error
    kinds = (PAIRS, ANSWERS, LABELLED, CHATS)  # answers also have the columns of chats
    kind = next((rows.kind for rows in kinds if set(rows.columns) <= columns), "other")
    if kind != expected.kind:
        raise StageError(
            f"train.objective is {params.train.objective}, which needs {expected.kind} rows, and {path} holds {kind} "
            f"rows; set data.kind: {expected.kind} and run `peftcore stage prepare` again, or choose another objective"
        )


def training_rows(params: Params, paths: Paths) -> dict[Split, Dataset]:
    """Return the train and validation rows, with a weight column only if some weight is not 1."""
    splits: tuple[Split, ...] = ("train", "validation")
    columns, rows = list(rows_of(params).columns), {}
    columns += ["margin"] if params.data.margin_column is not None else []
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
    rows = read_rows(path, list(rows_of(params).columns), limit)
    if rows_of(params) is ANSWERS:
        return [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
    return [_chosen(row) for row in rows] if rows_of(params) is PAIRS else rows


def _chosen(pair: Row) -> Row:
    return {"input_ids": pair["chosen_input_ids"], "labels": pair["chosen_labels"]}


def longest(params: Params, rows: dict[Split, Dataset]) -> int:
    """Return the tokens of the longest row."""
    return max(len(ids) for split in rows.values() for name in rows_of(params).token_ids for ids in split[name])


def class_names(params: Params, paths: Paths) -> list[str] | None:
    """Return the class names by index; None if the objective has no classes."""
    if rows_of(params) is RANKED:
        return [REWARD]
    if params.train.objective != "classification":
        return None
    if not paths.labels.exists():
        raise StageError(
            f"there is no {paths.labels}; set data.kind: classification and run `peftcore stage prepare` again"
        )
    return cast(list[str], json.loads(paths.labels.read_text()))


def padded_collator(params: Params, pad: int, longest_row: int) -> RightPaddingCollator:
    """Return the collator of padded batches of the objective's rows. longest_row: its length in tokens."""
    if rows_of(params) is ANSWERS:
        return UnpairedPreferenceCollator(pad, max_length=longest_row)
    if rows_of(params) is RANKED:
        return RewardCollator(pad)
    kinds = {"chat": RightPaddingCollator, "preference": PreferenceCollator, "classification": ClassificationCollator}
    return kinds[rows_of(params).kind](pad)


def check_batching(params: Params) -> None:
    """Raise StageError if the objective's rows cannot be concatenated."""
    if _is_packed(params) and rows_of(params) is not CHATS:
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
    if rows_of(params) is not CHATS:
        raise StageError(
            f"method.r is auto, whose search supports sft only, and train.objective is {params.train.objective}; give "
            "a rank"
        )
    return cast(list[Row], rows.select_columns(list(CHATS.columns)).to_list())


def start_rows(params: Params, rows: Dataset, count: int) -> list[Row]:
    """Return at most `count` training rows for a data-driven initialisation; of marked answers the desirable ones."""
    if rows_of(params) is ANSWERS:
        rows = rows.select([number for number, desirable in enumerate(rows["desirable"]) if desirable])
    return [rows[number] for number in range(min(len(rows), count))]


def start_batch(params: Params, rows: list[Row], pad: int) -> dict[str, Any]:
    """Return the forward's arguments for a data-driven initialisation; of pairs the chosen answers."""
    if rows_of(params) is PAIRS:
        rows = [_chosen(row) for row in rows]
    if rows_of(params) is RANKED:
        rows = [{"input_ids": row["chosen_input_ids"], "label": 0} for row in rows]
        batch = ClassificationCollator(pad)(rows)
        return {name: batch[name] for name in ("input_ids", "attention_mask")}
    collate = ClassificationCollator(pad) if rows_of(params) is LABELLED else RightPaddingCollator(pad)
    return {name: tensor for name, tensor in collate(rows).items() if name != WEIGHT}


def loss_function(params: Params) -> str:
    """Return a description of the test loss; losses of two runs are comparable if descriptions and rows are equal."""
    if rows_of(params) is PAIRS:
        return repr(preference_objective(params))
    if rows_of(params) is ANSWERS:
        return repr(kto_objective(params))
    if rows_of(params) is RANKED:
        return repr(reward_objective(params))
    return "cross entropy of classes" if rows_of(params) is LABELLED else "cross entropy of tokens"


def preference_objective(params: Params) -> PreferenceObjective:
    """Return the preference loss of the parameters."""
    options = params.train.preference
    if params.train.objective == "orpo":
        return Orpo(options.beta)
    if params.train.objective == "simpo":
        return SimPo(options.beta, options.gamma, likelihood_weight=options.rpo_alpha)
    return Dpo(
        beta=options.beta,
        loss=options.loss,
        label_smoothing=options.label_smoothing,
        length_normalized=options.length_normalized,
        rpo_alpha=options.rpo_alpha,
    )


def reward_objective(params: Params) -> BradleyTerry:
    """Return the loss of reward models of the parameters."""
    return BradleyTerry(params.train.reward.center_rewards_coefficient)


def kto_objective(params: Params) -> Kto:
    """Return the KTO loss of the parameters."""
    options = params.train.kto
    return Kto(options.beta, options.loss, options.desirable_weight, options.undesirable_weight)


def distillation_of(params: Params) -> Distillation:
    """Return the weights and the divergence of training with a teacher."""
    return Distillation(**params.train.distillation.model_dump(exclude={"teacher"}))


def _warn_of_imbalance(kto: Kto, desirable: int, undesirable: int) -> None:
    """Log a warning if the weights do not balance the two kinds of answers as the KTO paper recommends."""
    if not (desirable and undesirable and kto.desirable_weight and kto.undesirable_weight):
        return
    low, high = kto_weight_range(desirable, undesirable)
    ratio = kto.desirable_weight / kto.undesirable_weight
    if desirable != undesirable and not round(low, 2) <= round(ratio, 2) <= round(high, 2):
        log.warning(
            "%d training answers are desirable and %d are not: train.kto.desirable_weight should be %.2f to %.2f times "
            "undesirable_weight (arXiv:2402.01306, eq. 8), and it is %.2f times",
            *(desirable, undesirable, low, high, ratio),
        )


def trainer_of(
    params: Params, rows: Dataset, labels: list[str] | None, teacher: Any = None
) -> tuple[type[AdapterTrainer], dict[str, Any]]:
    """Return the trainer's class, and its arguments besides AdapterTrainer's.

    Args:
        params: The parameters of the run.
        rows: Training rows.
        labels: Names of the classes, if the objective has classes.
        teacher: A model to distil from; None with a teacher in the parameters: the base.
    """
    if rows_of(params) is PAIRS:
        options: dict[str, Any] = {
            "objective": preference_objective(params),
            "reference": "base",  # the reference in evaluation too, also if training continues an adapter
            "precompute_reference": params.train.preference.precompute_reference,
        }
        return cast(type[AdapterTrainer], PreferenceTrainer), options
    if rows_of(params) is ANSWERS:
        kto, desirable = kto_objective(params), sum(rows["desirable"])
        _warn_of_imbalance(kto, desirable, len(rows) - desirable)
        return cast(type[AdapterTrainer], KtoTrainer), {"objective": kto, "reference": "base"}
    if rows_of(params) is RANKED:
        return cast(type[AdapterTrainer], RewardTrainer), {"objective": reward_objective(params)}
    if labels is not None:
        balanced = params.train.classification.class_weights == "balanced"
        weights = balanced_class_weights(rows["label"], len(labels)) if balanced else None
        return cast(type[AdapterTrainer], ClassificationTrainer), {"class_weights": weights}
    if params.train.distillation.teacher is not None:
        options = {"distillation": distillation_of(params), "teacher": teacher}
        return cast(type[AdapterTrainer], DistillationTrainer), options
    return AdapterTrainer, {}
