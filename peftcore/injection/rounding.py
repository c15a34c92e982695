"""Calibrated rounding of a quantised base: `calibrate_rounding(model, batches)`. GPTQ: arXiv:2210.17323."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from peftcore.bases import BaseWeight, base_weight, is_adaptable
from peftcore.errors import ConfigError, PeftWarning
from peftcore.injection.adapter_set import ATTRIBUTE
from peftcore.injection.observation import observe
from peftcore.injection.original_weights import OriginalWeights, Source
from peftcore.kernels.calibrated_rounding import calibrated_codes
from peftcore.kernels.input_moments import InputMoments
from peftcore.kernels.maths import weight_shape


def calibrate_rounding(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    model_path: Source = None,
    damping: float = 0.01,
    activation_order: bool = True,
    forward: Callable[[Any, Mapping[str, Any]], Any] | None = None,
    progress: bool = True,
) -> None:
    """Round the weights of a quantised model again so that its layers' outputs change least on data, in place.

    Quantising rounds each weight to the nearest value. Here the error of one column is compensated by the columns that
    are rounded after it (GPTQ). Scales stay as they are, double quantisation included, so the storage and its files
    keep their format. Meanwhile a layer of i inputs takes 4·i² bytes.

    Args:
        model: A model with layers in 4 or 8 bits and without adapters.
        batches: Keyword arguments of the model, as tensors on its device. A few hundred rows of training data are
            enough.
        model_path: The weights from before the quantisation: a directory of safetensors, one such file, or
            {parameter path: tensor}; None for the directory, or the hub's cache, from which the model was loaded.
        damping: Share of the mean squared input that is added to each input's square. A larger share relies less on the
            data.
        activation_order: Round the columns with the largest inputs first.
        forward: Function to call as `forward(model, batch)` instead of `model(**batch)`.
        progress: Show progress bars.

    Raises:
        ConfigError: The model has adapters or no quantised layer, or the data do not fit. The model is then unchanged.
        CheckpointError: An original weight is missing. The model is then unchanged.
    """
    if damping <= 0:
        raise ConfigError(f"calibrate_rounding: damping must be above 0; got {damping}; try 0.01")
    bases = _quantised(model)
    original = OriginalWeights(model, model_path, {path: weight_shape(base) for path, base in bases.items()})
    moments = InputMoments("rounding")
    observe(model, moments, {path: base.layer for path, base in bases.items()}, batches, forward, progress)
    if unseen := [path for path in bases if not moments.tokens.get(path)]:
        warnings.warn(
            f"calibrate_rounding: no calibration row reaches {unseen[0]}"
            + (f" and {len(unseen) - 1} other layers" if len(unseen) > 1 else "")
            + ", which stay as they are; give more rows",
            PeftWarning,
            stacklevel=2,
        )
    before = {path: base.state() for path, base in bases.items()}
    try:
        for path in tqdm(
            [path for path in bases if path not in unseen], desc=moments.title, unit="layer", disable=not progress
        ):
            _round(bases[path], original.read(path), moments.pop(path), damping, activation_order)
    except BaseException:  # an interruption, too, leaves the model as it was
        for path, state in before.items():
            bases[path].restore(state)
        raise


def _quantised(model: nn.Module) -> dict[str, BaseWeight]:
    """Return the views of the quantised layers by path."""
    if ATTRIBUTE in vars(model):
        raise ConfigError("calibrate_rounding changes the base, so it comes before get_peft_model; unload the adapters")
    layers = ((path, module) for path, module in model.named_modules() if is_adaptable(module))
    bases = {path: base for path, module in layers if (base := base_weight(module, path)).quantized}
    if not bases:
        raise ConfigError("calibrate_rounding needs layers in 4 or 8 bits, and this model has none; load it quantised")
    if fixed := [path for path, base in bases.items() if base.grid() is None]:
        base = bases[fixed[0]]
        raise ConfigError(
            f"calibrate_rounding does not know the grid of {fixed[0]}, a {type(base.layer).__name__} with "
            f"{base.in_features} inputs; leave this call out (4 bits of bitsandbytes need a multiple of 64 inputs)"
        )
    return bases


@torch.no_grad()
def _round(
    base: BaseWeight, original: torch.Tensor, moment: torch.Tensor, damping: float, activation_order: bool
) -> None:
    grid = base.grid()
    assert grid is not None
    weight = original.to(base.device).float()
    base.write_codes(calibrated_codes(weight, moment, grid, damping, activation_order))
    base.clear_cache()
