"""Merging of IA3 adapters into one IA3, as HF PEFT does it: l = Σ w l_i.

A layer that an adapter does not change counts as l_i = 1. (HF PEFT leaves it out of the sum, as if l_i were 0.)
"""

import dataclasses
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from peftcore.errors import MergeError
from peftcore.injection.inject import commit_injection
from peftcore.injection.module_index import ModuleIndex
from peftcore.injection.preparation import prepare_injection
from peftcore.kernels.factors import LowRankReport
from peftcore.merging.insertion import target_modules
from peftcore.merging.sources import Sources
from peftcore.methods.ia3 import IA3, IA3Config


def all_ia3(sources: Sources) -> bool:
    """Return True if every source adapter is an IA3."""
    return all(isinstance(sources.config(name), IA3Config) for name in sources.names)


@torch.no_grad()
def add_ia3(model: nn.Module, name: str, sources: Sources, weights: Sequence[float]) -> LowRankReport:
    """Add the weighted sum of IA3 adapters to the model as a new IA3, frozen and not active.

    Returns:
        An error of 0 for each layer, and no ranks.

    Raises:
        MergeError: one adapter scales the input of a layer and another its output, or a value is NaN or infinite; the
            model is unchanged.
    """
    vectors: dict[str, Tensor] = {}
    inputs: set[str] = set()
    for path in sources.paths:
        adapters = [cast(IA3 | None, adapter) for adapter in sources.at(path)]
        ones = next(torch.ones_like(own.ia3_l) for own in adapters if own is not None)
        if len(sides := {own.scales_input for own in adapters if own is not None}) > 1:
            raise MergeError(
                f"{path}: some of {sources.names} scale the input (feedforward_modules) and others the output, and no "
                "IA3 does both; give svd_rank to merge them into a LoRA"
            )
        inputs |= {path} if sides == {True} else set()
        vectors[path] = sum(
            (w * (ones if own is None else own.ia3_l) for own, w in zip(adapters, weights, strict=True)),
            torch.zeros_like(ones),
        )
        if not vectors[path].isfinite().all():
            raise MergeError(f"{path}: the merged vector holds NaN or Inf, so nothing was added")
    paths = ModuleIndex(model).modules
    config = dataclasses.replace(
        cast(IA3Config, sources.config(sources.names[0])),
        inference_mode=True,
        target_modules=target_modules(vectors, paths),
        exclude_modules=None,
        feedforward_modules=inputs,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=sources.extra_modules.options()["modules_to_save"],
    )
    injection = prepare_injection(model, config, name)
    if missing := sorted(vectors.keys() - injection.adapters.keys()):
        raise MergeError(
            f"{missing[0]} is changed by one adapter and trained in full (modules_to_save) by another, and no adapter "
            "can do both; leave one of them out"
        )
    for path, vector in vectors.items():
        cast(IA3, injection.adapters[path]).ia3_l.copy_(vector)
    sources.extra_modules.copy_to(injection)
    commit_injection(model, injection, trainable=False)
    return LowRankReport.of({}, dict.fromkeys(vectors, (0.0, 0.0)))
