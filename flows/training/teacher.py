"""The teacher of a training run: a registered version on the same base, or another model."""

from typing import Any

from torch import nn

from flows.base.calibrated import trained_base
from flows.base.model import load_for_training
from flows.params import Params
from flows.paths import Paths
from flows.training.teacher_files import check_teacher, load_other_model
from peftcore import PeftModel
from peftcore.train import shared_copy


def load_teacher(params: Params, paths: Paths, base: nn.Module, longest: int) -> nn.Module | None:
    """Return the teacher; None without one, and if the teacher is the base, which needs no second model.

    A version's adapter lies on the weights of `base`, so only the adapter needs memory. If the new adapter's
    initialisation changes the base's weights, the version gets the base a second time.

    Args:
        params: The parameters of the run.
        paths: The project's files.
        base: The base model, before it gets an adapter.
        longest: Tokens of the longest training row.

    Raises:
        StageError: The start stage has not written this version, or the other model cannot be used.
        BaseModelError: The version was trained on another calibrated base.
    """
    distillation = params.train.distillation
    if distillation.teacher is None or distillation.teacher == "base":
        return None
    if distillation.version is None:
        return load_other_model(distillation.teacher, paths)
    check_teacher(params, paths)
    changes_base = params.start != "default" or "init_lora_weights" in params.method.options
    if not changes_base:
        copy: Any = shared_copy(base)
    else:
        copy = load_for_training(trained_base(paths, params.quantization), params.quantization, longest)
    return PeftModel.from_pretrained(copy, paths.teacher_adapter)
