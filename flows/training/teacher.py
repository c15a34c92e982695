"""The teacher of `train.distillation`: a registered version on the same base, or another model."""

import json
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from flows.base.model import load_for_training, load_tokenizer
from flows.base.source import load, obtain
from flows.errors import BaseModelError, StageError
from flows.params import Params
from flows.paths import Paths
from peftcore import PeftModel
from peftcore.train import shared_copy

KEY = "train.distillation.teacher"


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
    """
    distillation = params.train.distillation
    if distillation.teacher is None or distillation.teacher == "base":
        return None
    if distillation.version is None:
        return load_other_model(distillation.teacher, paths)
    check_teacher(params, paths)
    changes_base = params.method.init != "default" or "init_lora_weights" in params.method.options
    copy: Any = load_for_training(paths.base, params.quantization, longest) if changes_base else shared_copy(base)
    return PeftModel.from_pretrained(copy, paths.teacher_adapter)


def check_teacher(params: Params, paths: Paths) -> None:
    """Raise StageError if the start stage has not written the adapter of the version that is the teacher."""
    expected, written = params.train.distillation.version, paths.teacher_source
    version = json.loads(written.read_text())["version"] if written.exists() else None
    if version != expected:
        raise StageError(f"{KEY} is {expected}, and {paths.start} has {version or 'none'}; run `peftcore stage start`")


def load_other_model(source: str, paths: Paths) -> nn.Module:
    """Return another causal language model in bfloat16 that has the base's tokens.

    Raises:
        StageError: The model cannot be loaded, or its tokenizer differs from the base's.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            model, tokenizer = load(source, obtain(source, paths.root, Path(scratch)))
        except BaseModelError as error:
            raise StageError(str(error).replace("base.source", KEY)) from error
    ours, theirs = (each.get_vocab() for each in (load_tokenizer(paths.base), tokenizer))
    if ours != theirs:
        unequal = len(ours.items() ^ theirs.items())
        raise StageError(
            f"{KEY} {source}: its tokenizer differs from the base's in {unequal} entries, so the two models' "
            "distributions cannot be compared; give a model of the same family"
        )
    return model
