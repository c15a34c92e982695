"""The files of the teacher that `train.distillation` names."""

import json
import tempfile
from pathlib import Path

from torch import nn

from flows.base.calibrated import calibrated_identity, check_adapter, trained_base
from flows.base.folder import load_tokenizer
from flows.base.source import load, obtain
from flows.errors import BaseModelError, StageError
from flows.params import Params
from flows.paths import Paths

KEY = "train.distillation.teacher"


def check_teacher(params: Params, paths: Paths) -> None:
    """Check the adapter of the version that is the teacher.

    Raises:
        StageError: The start stage has not written it.
        BaseModelError: It was trained on another calibrated base than this run's.
    """
    expected, written = params.train.distillation.version, paths.teacher_source
    version = json.loads(written.read_text(encoding="utf-8"))["version"] if written.exists() else None
    if version != expected:
        raise StageError(f"{KEY} is {expected}, and {paths.start} has {version or 'none'}; run `peftcore stage start`")
    check_adapter(paths.teacher_adapter, calibrated_identity(trained_base(paths, params.quantization)))


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
