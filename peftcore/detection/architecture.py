"""Result types of `detect`: frozen records that convert to JSON."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from peftcore.detection.defaults import NORMS, target_names
from peftcore.detection.module_tree import BlockList
from peftcore.detection.prefix import PrefixGeometry
from peftcore.detection.roles import Role


@dataclass(frozen=True)
class LinearInfo:
    """The layers that one name in `target_modules` matches."""

    role: Role
    in_features: int
    """Input features of the most frequent shape; vocabulary size for an embedding, channels for a convolution."""
    out_features: int
    count: int
    shapes: tuple[tuple[int, int, int], ...]
    """(in_features, out_features, count) of each shape, the most frequent first."""
    patterns: tuple[str, ...]
    """Full paths with `*` for an index."""
    quantizable: bool
    """True if all of the layers can be stored in 4 bits."""


@dataclass(frozen=True)
class ExpertInfo:
    """Raw parameters that stack the weights of all experts: (experts, out, in), or (experts, in, out) if transposed."""

    role: Role
    experts: int
    in_features: int
    out_features: int
    transposed: bool
    count: int
    """Number of parameters with this name: one for each block with experts."""


@dataclass(frozen=True)
class NormInfo:
    """The norms that one name in `target_modules` matches."""

    features: int
    """Size of the first norm's weight."""
    count: int
    patterns: tuple[str, ...]
    """Full paths with `*` for an index."""


@dataclass(frozen=True)
class Architecture:
    """The architecture of a model. Sizes are counts; memory is in bytes."""

    family: str
    """`config.model_type`; the class name if the model has no `model_type`."""
    class_name: str
    kind: str
    """Kind of model: "causal decoder", "encoder", "encoder-decoder", "vision encoder" or "other"."""
    num_blocks: int
    """Number of blocks in the largest block list; 0 for a model without repeated blocks."""
    block_pattern: str | None
    """Path of a block in that list, with `*` for its index."""
    blocks: tuple[BlockList, ...]
    hidden_size: int | None
    """Width of the main stack: the stack that processes tokens, or the largest stack."""
    vocab_size: int | None
    target_modules: dict[str, LinearInfo]
    """{name for `target_modules`: matched layers}; pass a name with `*` through `target_regex`."""
    experts: dict[str, ExpertInfo]
    tied_weights: tuple[tuple[str, ...], ...]
    """Groups of parameter names that share one parameter."""
    norms: dict[str, NormInfo]
    """{name for `target_modules`: matched norms}, for norms of the residual stream."""
    prefix: PrefixGeometry | None
    """Geometry of a key/value prefix; None for a model whose forward accepts no cache."""
    packable: bool
    """True if several documents can share a row, given a block-diagonal mask and restarted positions.

    False for recurrent and linear attention, convolutions over time and attention without a pair mask, because they
    mix neighbouring documents. Also False for encoder-decoders and models without tokens.
    """
    default_targets: tuple[str, ...]
    """`targets_for("LORA")`: query and value layers, or the fused projection."""
    all_linear: tuple[str, ...]
    """Every linear-like layer except the head."""
    feed_forward: tuple[str, ...]
    """Layers of the MLPs."""
    feedforward_modules: tuple[str, ...]
    """Names in `targets_for("IA3")` whose input IA3 scales: the last layers of the MLPs."""
    quantizable: tuple[str, ...]
    """Layers that can be stored in 4 bits: not the head, not tied, and in_features divisible by 64."""
    parameters: int
    """Number of weights of the base model; tied weights count once."""
    dtypes: dict[str, int]
    """{storage dtype: number of weights}"""
    memory_bfloat16: int
    """Bytes if all weights are in bfloat16."""
    memory_nf4: int
    """Bytes if quantisable layers are in NF4 with double quantisation (4.127 bits a weight), the rest in bfloat16."""
    unreached: dict[str, int]
    """{class: number of weights} of matrices that no adapter can target, expert stacks excepted."""

    def targets(self, *roles: Role) -> tuple[str, ...]:
        """Return the names of the layers with one of these roles."""
        return tuple(name for name, info in self.target_modules.items() if info.role in roles)

    def targets_for(self, method: str) -> list[str]:
        """Return the default targets of a method.

        Args:
            method: A `peft_type` such as "IA3"; LoRA's targets are returned for an unknown method.

        Returns:
            Names for `target_modules`; pass a name with `*` through `target_regex`. Empty if no layer inside the model
            can be adapted.
        """
        if method == NORMS:
            return list(self.norms)
        widths = {block.hidden_size for block in self.blocks}
        readers = {name for name, info in self.target_modules.items() if info.in_features in widths}
        roles: dict[str, Role] = {name: info.role for name, info in self.target_modules.items()}
        return target_names(method, self.family, roles, readers)

    def target_regex(self, names: Iterable[str]) -> str:
        """Return a regular expression for `target_modules` that matches exactly the layers of these names."""
        known = self.norms | self.target_modules
        patterns = [pattern for name in names for pattern in known[name].patterns]
        return "|".join(re.escape(pattern).replace(r"\*", r"\d+") for pattern in patterns)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as dictionaries, lists and scalars, for JSON."""
        return asdict(self)
