"""dpo, orpo and simpo: losses of a chosen and a rejected answer to the same prompt, `peftcore.train.preference`."""

from typing import Any

from datasets import Dataset

from flows.data.rows import Row
from flows.params import Params
from flows.training.objectives.objective import Objective, Rows, Trainer
from peftcore import TaskType
from peftcore.train import (
    PAIR_COLUMNS,
    Dpo,
    Orpo,
    PreferenceCollator,
    PreferenceObjective,
    PreferenceTrainer,
    RightPaddingCollator,
    SimPo,
)


class Preference(Objective):
    """Objective of preference pairs."""

    rows = Rows("preference", PAIR_COLUMNS, ("chosen_input_ids", "rejected_input_ids"), TaskType.CAUSAL_LM)

    def collator(self, pad: int, longest_row: int) -> RightPaddingCollator:
        """Return the padding collator of these rows."""
        return PreferenceCollator(pad)

    def model_row(self, row: Row) -> Row:
        """Return the chosen answer."""
        return {"input_ids": row["chosen_input_ids"], "labels": row["chosen_labels"]}

    def loss_function(self, params: Params) -> str:
        """Return a description of the loss."""
        return repr(preference_objective(params))

    def trainer(self, params: Params, rows: Dataset, labels: list[str] | None, teacher: Any) -> Trainer:
        """Return the trainer and its arguments."""
        options = {
            "objective": preference_objective(params),
            "reference": "base",  # the reference in evaluation too, also if training continues an adapter
            "precompute_reference": params.train.preference.precompute_reference,
        }
        return PreferenceTrainer, options


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
