"""What `detect` says of a model: frozen records that turn into plain JSON."""

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
    """Layers that one name in `target_modules` reaches."""

    role: Role
    in_features: int
    """Of the most frequent shape; vocabulary size for an embedding, channels for a convolution."""
    out_features: int
    count: int
    shapes: tuple[tuple[int, int, int], ...]
    """(in_features, out_features, count) of every shape, the most frequent first."""
    patterns: tuple[str, ...]
    """Full paths, `*` for an index."""
    quantizable: bool
    """Whether 4-bit storage can hold all of them."""


@dataclass(frozen=True)
class ExpertInfo:
    """Raw expert weights, (experts, out, in) or transposed (experts, in, out): parameters, not layers."""

    role: Role
    experts: int
    in_features: int
    out_features: int
    transposed: bool
    count: int
    """Parameters with this name; one per block that has experts."""


@dataclass(frozen=True)
class NormInfo:
    """Norms that one name in `target_modules` reaches."""

    features: int
    """Of the first of them."""
    count: int
    patterns: tuple[str, ...]
    """Full paths, `*` for an index."""


@dataclass(frozen=True)
class Architecture:
    """What `detect` found. Sizes are counts; memory is in bytes."""

    family: str
    """`config.model_type`, or the class name of a model without one."""
    class_name: str
    kind: str
    """"causal decoder", "encoder", "encoder-decoder", "vision encoder" or "other"."""
    num_blocks: int
    """Blocks of the largest list; 0 for a model without repeated blocks."""
    block_pattern: str | None
    """Path of one such block, `*` for its index."""
    blocks: tuple[BlockList, ...]
    hidden_size: int | None
    """Width of the main stack: the one its tokens go through, else the largest."""
    vocab_size: int | None
    target_modules: dict[str, LinearInfo]
    """{name for `target_modules`: what it reaches}; a name with `*` works through `target_regex` only."""
    experts: dict[str, ExpertInfo]
    tied_weights: tuple[tuple[str, ...], ...]
    """Groups of names that are one parameter."""
    norms: dict[str, NormInfo]
    """{name for `target_modules`: what it reaches} of the norms on the stream from block to block."""
    prefix: PrefixGeometry | None
    """What a key/value prefix must fit; None for a model that takes no keys and values from its caller."""
    packable: bool
    """Whether several documents may share a row, given a mask that keeps them apart and positions that start anew.

    False for recurrent and linear attention, convolutions over time and attention without such a mask, because they
    carry one document into the next; also for encoder-decoders and models without tokens.
    """
    default_targets: tuple[str, ...]
    """`targets_for("LORA")`: query and value, or the fused projection."""
    all_linear: tuple[str, ...]
    """Every linear-like layer except the head."""
    feed_forward: tuple[str, ...]
    """The MLPs' layers."""
    feedforward_modules: tuple[str, ...]
    """Those of `targets_for("IA3")` that IA3 scales at their input: the MLPs' last layers."""
    quantizable: tuple[str, ...]
    """Names that 4-bit storage can hold: neither head nor tied, whole blocks of 64 weights per input row."""
    parameters: int
    """Weights of the base model, tied ones once."""
    dtypes: dict[str, int]
    """{dtype of the storage: weights kept in it}"""
    memory_bfloat16: int
    memory_nf4: int
    """All quantisable layers in NF4 with double quantisation (4.127 bits a weight), the rest in bfloat16."""
    unreached: dict[str, int]
    """{class: weights} of matrices that no adapter reaches, experts aside (routers, nn.MultiheadAttention)."""

    def targets(self, *roles: Role) -> tuple[str, ...]:
        """Names of the layers with these roles."""
        return tuple(name for name, info in self.target_modules.items() if info.role in roles)

    def targets_for(self, method: str) -> list[str]:
        """Names that `method`, a `peft_type` such as "IA3", adapts where the user names none; LoRA's if it is unknown.

        A name with `*` works through `target_regex` only. Empty where no layer inside the model can be adapted.
        """
        if method == NORMS:
            return list(self.norms)
        widths = {block.hidden_size for block in self.blocks}
        readers = {name for name, info in self.target_modules.items() if info.in_features in widths}
        roles: dict[str, Role] = {name: info.role for name, info in self.target_modules.items()}
        return target_names(method, self.family, roles, readers)

    def target_regex(self, names: Iterable[str]) -> str:
        """One regular expression for `target_modules` that matches exactly these names' layers."""
        known = self.norms | self.target_modules
        patterns = [pattern for name in names for pattern in known[name].patterns]
        return "|".join(re.escape(pattern).replace(r"\*", r"\d+") for pattern in patterns)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and scalars, for JSON."""
        return asdict(self)
