"""Tied weights: a head that shares an embedding's weight uses the embedding's factors, transposed."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from peftcore.methods.lora.variant import Variant, register_variant

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora
    from peftcore.methods.lora.config import LoraConfig


@register_variant
class TiedWeights(Variant):
    """Variant for `ensure_weight_tying=True`: a tied head uses the embedding's factors, transposed."""

    option = "ensure_weight_tying"
    changes_layers = False
    layer_kinds = frozenset({"linear", "conv", "embedding", "parameter"})

    def link(self, config: "LoraConfig", adapters: "Mapping[str, Lora]") -> None:
        layers = list(adapters.values())
        # kept in a list, because a parametrised layer creates a new weight at each access and ids could repeat
        weights = [a.base.layer.weight if a.base.kind in ("embedding", "linear") else None for a in layers]
        embeddings = {id(w): a for a, w in zip(layers, weights, strict=True) if a.base.kind == "embedding"}
        for adapter, weight in zip(layers, weights, strict=True):
            source = embeddings.get(id(weight)) if adapter.base.kind == "linear" else None
            if source is not None:
                adapter.follow(source)
