"""Trainable tokens: chosen rows of an embedding train whole, the others stay fixed. HF PEFT's method of this name.

A head that shares the embedding's weight follows it: one parameter serves both.
Shapes: t chosen tokens, d embedding dimension; rows (t, d). On a linear layer, such as a head, rows of its weight.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig
from peftcore.errors import ConfigError, MergeError, OptionRangeError, TargetError
from peftcore.registry import register


@dataclass
class TrainableTokensConfig(TunerConfig):
    """Options of trainable tokens under PEFT's names; without target_modules, the model's input embedding."""

    not_saved_if_none: ClassVar[tuple[str, ...]] = (
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
        "modules_to_save",
    )

    token_indices: list[int] = field(default_factory=list)
    """Token ids whose rows train."""
    init_weights: bool = True
    """True: start with the base's own rows; False: at random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ids = self.token_indices
        if any(not isinstance(i, int) or i < 0 for i in ids) or len(set(ids)) < len(ids):
            raise ConfigError(f"TrainableTokensConfig: token_indices must be different token ids; got {ids!r}")

    def check_complete(self) -> None:
        super().check_complete()
        if not self.token_indices:
            raise ConfigError("TrainableTokensConfig: token_indices is empty; give at least one token id")

    @property
    def trains_single_rows(self) -> bool:
        return True


@register("TRAINABLE_TOKENS", TrainableTokensConfig)
class TrainableTokens(Adapter):
    """Trained rows at one embedding or head."""

    layer_kinds = frozenset({"embedding", "linear"})
    follows_ties = True
    tokens: Tensor
    """Chosen token ids (t)."""
    place: Tensor
    """Index of each id's row among the trained rows, (rows of the layer); -1 for the others."""

    def __init__(self, config: TrainableTokensConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        self.axis = 1 if base.kind == "embedding" else 0  # where the tokens lie in the canonical weight
        count = base.in_features if base.kind == "embedding" else base.out_features
        width = base.out_features if base.kind == "embedding" else base.in_features
        if max(config.token_indices) >= count:
            raise OptionRangeError(
                f"TRAINABLE_TOKENS: token {max(config.token_indices)} is not among the {count} rows of {path}; "
                "resize the embedding first, or leave it out"
            )
        self.follows = False
        self.from_base = config.init_weights
        self.chosen, self.count = tuple(config.token_indices), count
        self.trainable_tokens_delta = nn.Parameter(torch.empty(len(self.chosen), width))
        self.make_constants()

    def make_constants(self) -> None:
        device = self.trainable_tokens_delta.device
        tokens = torch.tensor(self.chosen, device=device)
        numbers = torch.arange(len(self.chosen), device=device)
        place = torch.full((self.count,), -1, device=device).index_copy(0, tokens, numbers)
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("place", place, persistent=False)

    def replaced_rows(self) -> tuple[int, ...]:
        return self.chosen

    @property
    def trainable_tokens_original(self) -> Tensor:
        """The base's own rows of the chosen tokens (t, d); HF PEFT's name."""
        rows = self.base.read_unmerged().index_select(self.axis, self.tokens)
        return rows.T if self.axis else rows

    def extra_repr(self) -> str:
        return f"tokens={len(self.chosen)}"

    @classmethod
    def default_targets(cls, config: Any, model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        embedding = getattr(embedding, "base_layer", embedding)
        found = next((path for path, layer in layers.items() if layer is embedding), None)
        if found is None:
            raise TargetError(f"{type(model).__name__} has no get_input_embeddings; give target_modules")
        return [found]

    @classmethod
    def link(cls, config: Any, adapters: Mapping[str, Adapter]) -> None:
        first: dict[int, TrainableTokens] = {}
        # embeddings first, because HF PEFT saves the shared rows under the embedding's path
        made = sorted(cast(Mapping[str, TrainableTokens], adapters).values(), key=lambda a: a.base.kind != "embedding")
        weights = [
            adapter.base.shared_weight for adapter in made
        ]  # held here, because a parametrised weight has no other owner
        for adapter, weight in zip(made, weights, strict=True):
            source = first.setdefault(id(weight), adapter)
            if source is not adapter:
                adapter.follows, adapter.trainable_tokens_delta = True, source.trainable_tokens_delta

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.from_base:
            self.trainable_tokens_delta.copy_(self.trainable_tokens_original)
        else:
            # PEFT draws on the device and in the type of the base
            self.trainable_tokens_delta.copy_(torch.randn_like(self.trainable_tokens_delta, dtype=self.base.dtype))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if self.base.kind == "linear":  # as a change, because other adapters may have changed the bias
            return y.index_add(-1, self.tokens, F.linear(x, self._change().to(x.dtype)).to(y.dtype))
        rows = self.trainable_tokens_delta.to(y.dtype)
        place = self.place[x]
        scale = getattr(self.base.layer, "embed_scale", None)
        chosen = F.embedding(place.clamp_min(0), rows if scale is None else rows * scale)
        return torch.where(place[..., None] >= 0, chosen, y)

    def merged_weight(self, weight: Tensor) -> Tensor:
        if self.base.kind == "linear":
            return weight.index_add(0, self.tokens, self._change().to(weight))
        return weight.index_copy(1, self.tokens, self.trainable_tokens_delta.to(weight).T)

    def check_mergeable_with(self, others: Iterable[Adapter]) -> None:
        for other in others:
            if isinstance(other, TrainableTokens) and (both := sorted(set(self.chosen) & set(other.chosen))):
                raise MergeError(
                    f"another adapter trains the rows of tokens {both}, too, and one would overwrite the other's"
                )

    def changes_like(self, other: Adapter) -> bool:
        return isinstance(other, TrainableTokens) and other.trainable_tokens_delta is self.trainable_tokens_delta

    def _change(self) -> Tensor:
        """Return (t, d): the trained rows of a linear layer minus the base's own."""
        return self.trainable_tokens_delta - self.trainable_tokens_original.to(self.trainable_tokens_delta)

    def checkpoint_keys(self) -> dict[str, str]:
        return {} if self.follows else super().checkpoint_keys()

    def repeated_keys(self) -> set[str]:
        return {"trainable_tokens_delta"} if self.follows else set()

    def repeated_tensors(self) -> dict[str, Tensor]:
        is_own_method = not self.disk_prefix  # HF PEFT repeats no rows of `trainable_token_indices`
        return (
            {"trainable_tokens_delta": self.trainable_tokens_delta.detach()} if self.follows and is_own_method else {}
        )
