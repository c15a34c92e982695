"""Tied weights: layers that share an embedding's weight use the embedding's factors; a head uses the transposes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from peftcore.methods.lora.variant import Variant, register_variant

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora
    from peftcore.methods.lora.config import LoraConfig


@register_variant
class TiedWeights(Variant):
    """Variant for `ensure_weight_tying=True`: tied layers use the factors of the first embedding among them."""

    option = "ensure_weight_tying"
    changes_layers = False
    layer_kinds = frozenset({"linear", "conv", "embedding", "parameter"})

    def link(self, config: "LoraConfig", adapters: "Mapping[str, Lora]") -> None:
        layers = list(adapters.values())
        # kept in a list, because a parametrised layer creates a new weight at each access and ids could repeat
        weights = [a.base.shared_weight if a.base.kind in ("embedding", "linear") else None for a in layers]
        embeddings: dict[int, Lora] = {}
        for adapter, weight in zip(layers, weights, strict=True):
            if adapter.base.kind == "embedding":
                embeddings.setdefault(id(weight), adapter)
        for adapter, weight in zip(layers, weights, strict=True):
            source = None if weight is None else embeddings.get(id(weight))
            if source is not None and source is not adapter:
                adapter.follow(source)
