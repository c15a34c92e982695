"""What adapters bring besides changes of weights: modules that train whole, and trained rows of embeddings.

They have no change that could be weighed, so they go along as they are, and at one place from one adapter only, as in
HF PEFT (which makes a fresh copy of the base's module, though, and drops the trained one).
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
class Companions:
    """By path."""

    copies: dict[str, nn.Module]
    tokens: dict[str, TrainableTokens]
    names: list[str]
    """`modules_to_save` of the adapters that the copies are from."""

    def options(self) -> dict[str, Any]:
        """What of a configuration asks for them."""
        unnamed = [path for path in self.copies if not named(path, self.names)]
        rows = {path: own.tokens.tolist() for path, own in self.tokens.items() if not own.follows}
        return {"modules_to_save": [*self.names, *unnamed] or None, "trainable_token_indices": rows or None}

    @torch.no_grad()
    def take_to(self, injection: Injection) -> None:
        """Put copies of them into an adapter that `options` has asked for."""
        injection.copies |= copy.deepcopy(self.copies)  # at once, so that copies that share a weight go on doing so
        for path, own in self.tokens.items():
            cast(TrainableTokens, injection.adapters[path]).trainable_tokens_delta.copy_(own.trainable_tokens_delta)


def companions_of(adapters: AdapterSet, names: Sequence[str]) -> Companions:
    """Those of several adapters; MergeError where two have them at one place, or one trains the base's biases."""
    copies: dict[str, nn.Module] = {}
    tokens: dict[str, TrainableTokens] = {}
    saved: list[str] = []
    for name in dict.fromkeys(names):
        if adapters.biases(name):
            raise MergeError(
                f"adapter {name!r} trains the base's own biases (bias={_bias_mode(adapters, name)!r}), which no recipe "
                "combines; train it with bias='none' to combine it"
            )
        own, rows = adapters.copies(name), adapters.adapters(name)
        for path in adapters.of_method(name):
            del rows[path]
        if twice := sorted((own.keys() & copies.keys()) | (rows.keys() & tokens.keys())):
            raise MergeError(
                f"{twice[0]} is trained whole (modules_to_save or trainable_token_indices) by more than one of "
                f"{list(names)}, and such modules cannot be combined; leave all but one of these adapters out"
            )
        copies |= own
        tokens |= cast(dict[str, TrainableTokens], rows)
        saved += [n for n in adapters.configs[name].modules_to_save or [] if own and n not in saved]
    return Companions(copies, tokens, saved)


def _bias_mode(adapters: AdapterSet, name: str) -> str:
    return adapters.configs[name].bias
