"""sft: cross entropy of a chat's supervised tokens or of a text, with a teacher also the divergence from it."""

from typing import Any

from datasets import Dataset

from flows.params import Params
from flows.training.objectives.objective import Objective, Rows, Trainer
from peftcore import TaskType
from peftcore.train import AdapterTrainer, Distillation, DistillationTrainer


class SupervisedFinetuning(Objective):
    """Objective of chats and texts."""

    rows = Rows("chat", ("input_ids", "labels"), ("input_ids",), TaskType.CAUSAL_LM)
    packed = True

    def loss_function(self, params: Params) -> str:
        """Return a description of the loss."""
        return "cross entropy of tokens"

    def trainer(self, params: Params, rows: Dataset, labels: list[str] | None, teacher: Any) -> Trainer:
        """Return the trainer and its arguments."""
        if params.train.distillation.teacher is None:
            return AdapterTrainer, {}
        return DistillationTrainer, {"distillation": distillation_of(params), "teacher": teacher}


def distillation_of(params: Params) -> Distillation:
    """Return the weights and the divergence of training with a teacher."""
    return Distillation(**params.train.distillation.model_dump(exclude={"teacher"}))
