"""Extra trained modules of the adapters to merge: `modules_to_save` and trained rows of embeddings.

A recipe merges weight changes, and these modules are not weight changes. So they are copied unchanged into the merged
adapter, and at most one of the source adapters may have such a module at one path. (HF PEFT drops the trained module
and copies the base's.)
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from peftcore.errors import MergeError
from peftcore.injection.adapter_set import AdapterSet
from peftcore.injection.preparation import Injection
from peftcore.injection.targets import named
from peftcore.methods.trainable_tokens import TrainableTokens


@dataclass(frozen=True)
class ExtraModules:
    """The extra trained modules of several adapters, by path."""

    copies: dict[str, nn.Module]
    tokens: dict[str, TrainableTokens]
    names: list[str]
    """`modules_to_save` of the adapters that the copies come from."""

    def options(self) -> dict[str, Any]:
        """Return `modules_to_save` and `trainable_token_indices` of an adapter with these modules."""
        unnamed = [path for path in self.copies if not named(path, self.names)]
        rows = {path: own.tokens.tolist() for path, own in self.tokens.items() if not own.follows}
        return {"modules_to_save": [*self.names, *unnamed] or None, "trainable_token_indices": rows or None}

    @torch.no_grad()
    def copy_to(self, injection: Injection) -> None:
        """Copy the modules into an adapter whose configuration has the fields of `options`."""
        injection.copies |= copy.deepcopy(self.copies)  # in one call, so that modules that share a weight still do
        for path, own in self.tokens.items():
            cast(TrainableTokens, injection.adapters[path]).trainable_tokens_delta.copy_(own.trainable_tokens_delta)


def extra_modules_of(adapters: AdapterSet, names: Sequence[str]) -> ExtraModules:
    """Collect the extra trained modules; MergeError if two share a path, or an adapter trains the base's biases."""
    copies: dict[str, nn.Module] = {}
    tokens: dict[str, TrainableTokens] = {}
    saved: list[str] = []
    for name in dict.fromkeys(names):
        if adapters.biases(name):
            raise MergeError(
                f"adapter {name!r} trains the base's own biases (bias={_bias_mode(adapters, name)!r}), which no recipe "
                "merges; train it with bias='none' to merge it"
            )
        own, rows = adapters.copies(name), adapters.adapters(name)
        for path in adapters.of_method(name):
            del rows[path]
        if conflicts := sorted((own.keys() & copies.keys()) | (rows.keys() & tokens.keys())):
            raise MergeError(
                f"{conflicts[0]} is trained in full (modules_to_save or trainable_token_indices) by more than one of "
                f"{list(names)}, and such modules cannot be merged; leave all but one of these adapters out"
            )
        copies |= own
        tokens |= cast(dict[str, TrainableTokens], rows)
        saved += [n for n in adapters.configs[name].modules_to_save or [] if own and n not in saved]
    return ExtraModules(copies, tokens, saved)


def _bias_mode(adapters: AdapterSet, name: str) -> str:
    return adapters.configs[name].bias
