"""The module tree of a model: adaptable layers, norms and repeated blocks.

Adapter layers are skipped: each path and module is that of the base model, so a model with adapters has the same tree
as without.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property

from torch import nn

from peftcore.bases import base_weight, calls_layer, is_adaptable


@dataclass(frozen=True)
class AdaptableLayer:
    """A layer of the base model that an adapter can change."""

    path: str
    module: nn.Module
    kind: str
    """"linear", "conv" or "embedding"."""
    in_features: int
    out_features: int

    @property
    def parent(self) -> str:
        """Path of the parent module."""
        return self.path.rpartition(".")[0]


@dataclass(frozen=True)
class BlockList:
    """A list of repeated blocks in the model."""

    pattern: str
    """Path of a block with `*` for its index: "model.layers.*"."""
    count: int
    class_name: str
    """Class of the most frequent block."""
    hidden_size: int
    """Width of the residual stream in most of the blocks (the stages of a pyramid differ)."""
    paths: tuple[str, ...] = field(repr=False)
    """Paths of the blocks, in order of declaration."""


def look_through(module: nn.Module) -> nn.Module:
    """Return the base layer inside any number of adapter layers."""
    while isinstance(base := getattr(module, "base_layer", None), nn.Module):
        module = base
    return module


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) of the whole tree in order of declaration; a module registered twice is yielded twice."""
    module = look_through(module)
    yield path, module
    for name, child in module.named_children():
        if not hasattr(child, "is_no_part_of_the_base"):
            yield from walk(child, f"{path}.{name}" if path else name)


def is_below(path: str, root: str) -> bool:
    """Return True if `path` lies strictly inside `root`."""
    return path != root and (not root or path.startswith(root + "."))


def ancestors(path: str, root: str = "") -> list[str]:
    """Return the paths strictly between `root` and `path`, outermost first."""
    skip = root.count(".") + 1 if root else 0
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(skip + 1, len(parts))]


def pattern_of(path: str) -> str:
    """Return `path` with `*` for each index except a final one, so that all blocks have the same patterns."""
    return re.sub(r"(?<![^.])\d+(?=\.)", "*", path)


class ModuleTree:
    """A model's modules, adaptable layers, norms and blocks by path; a shared module has its first path."""

    def __init__(self, model: nn.Module):
        self.modules: dict[str, nn.Module] = {}
        self.layers: dict[str, AdaptableLayer] = {}
        self.norms: dict[str, int] = {}
        """{path of an adaptable norm: its size}"""
        seen: set[int] = set()
        for path, module in walk(model):
            if id(module) not in seen:
                seen.add(id(module))
                self.modules[path] = module
                parent, _, name = path.rpartition(".")
                if path and is_adaptable(module) and calls_layer(self.modules[parent], name):
                    base = base_weight(module, path)
                    if base.kind == "norm":
                        self.norms[path] = int(base.in_features)
                    else:
                        self.layers[path] = AdaptableLayer(
                            path, module, base.kind, int(base.in_features), int(base.out_features)
                        )
        self._order = list(self.modules)
        self._position = {path: position for position, path in enumerate(self._order)}
        self._block_kinds = {"linear"}
        self.blocks: dict[str, str] = self._find_blocks()
        """{path of a block: pattern of its list}"""
        if not self.blocks:  # SqueezeBERT's blocks have convolutions of kernel size 1 in place of linear layers
            self._block_kinds = {"linear", "pointwise"}
            self.blocks = self._find_blocks()

    def below(self, root: str) -> Iterator[str]:
        """Yield the paths strictly inside `root`, in order of declaration."""
        later = itertools.islice(self._order, self._position[root] + 1, None)
        return itertools.takewhile(lambda path: is_below(path, root), later)

    def linears(self, root: str = "") -> list[AdaptableLayer]:
        """Return the linear layers strictly inside `root`, in order of declaration."""
        layers = (self.layers[path] for path in self.below(root) if path in self.layers)
        return [layer for layer in layers if _kind_or_pointwise(layer) in self._block_kinds]

    def parent_of(self, layer: AdaptableLayer) -> nn.Module:
        """Return the parent module of a layer."""
        return self.modules[layer.parent]

    def block_of(self, path: str) -> str | None:
        """Return the path of the block that contains `path`; None outside of the blocks."""
        return next((root for root in ancestors(path) if root in self.blocks), None)

    def width(self, root: str) -> int:
        """Return the most likely width of the residual stream in the block at `root`; 0 without linear layers."""
        norms = []
        for path in self.below(root):
            weight = getattr(self.modules[path], "weight", None)
            if isinstance(weight, nn.Parameter) and weight.ndim == 1 and _is_norm(self.modules[path]):
                norms.append(weight.shape[0])
        return width_of(self.linears(root), norms)

    def block_lists(self) -> list[BlockList]:
        """Return the lists of repeated blocks, the list with most weights first."""
        members: dict[str, list[str]] = {}
        for path, pattern in self.blocks.items():
            members.setdefault(pattern, []).append(path)
        weights = {pattern: sum(map(self._weights, paths)) for pattern, paths in members.items()}
        return [self._block_list(pattern, members[pattern]) for pattern in sorted(weights, key=lambda p: -weights[p])]

    def _weights(self, path: str) -> int:
        return sum(parameter.numel() for parameter in self.modules[path].parameters())

    def _block_list(self, pattern: str, paths: list[str]) -> BlockList:
        classes = Counter(type(self.modules[path]).__name__ for path in paths)
        widths = Counter(self.stream(path) for path in paths)
        return BlockList(pattern, len(paths), classes.most_common(1)[0][0], widths.most_common(1)[0][0], tuple(paths))

    def stream(self, root: str) -> int:
        """Return the width of the residual stream between blocks.

        The result is `width`, unless another size of the block's layers is more frequent outside of the blocks. The
        layers inside a bottleneck (MobileBERT), or across several streams (hyper-connections), are not as wide as the
        stream between blocks.
        """
        layers, width = self.linears(root), self.width(root)
        both = {layer.in_features for layer in layers} & {layer.out_features for layer in layers}
        outside = self._sizes_around(root.rpartition(".")[0])
        votes = {size: count for size, count in outside.items() if size in both}
        most = max(votes.values(), default=0)
        return width if votes.get(width, 0) == most else next(size for size, count in votes.items() if count == most)

    @cache  # noqa: B019 - a tree lives as long as one call of `detect`
    def _sizes_around(self, path: str) -> Counter[int]:
        """Count the sizes of embeddings and norms outside of the blocks, in the tower around a block list.

        The tower is the smallest part of the model that contains the list and its own input layer.
        """
        for tower in [*reversed(ancestors(f"{path}.*")), ""]:
            inside = [p for p in self._outside if is_below(p, tower)]
            if any(p in self.layers and self.layers[p].kind != "linear" for p in inside):
                tables = [p for p in inside if p in self.layers and self.layers[p].kind == "embedding"]
                # a norm may span several streams, so an embedding table counts twice
                return Counter(self._outside[p] for p in [*tables, *tables, *(p for p in inside if p in self.norms)])
        return Counter()

    @cached_property
    def _outside(self) -> dict[str, int]:
        """{path: output size} of layers and norms outside of the blocks."""
        sizes = {path: layer.out_features for path, layer in self.layers.items()} | self.norms
        return {path: size for path, size in sizes.items() if self.block_of(path) is None}

    def _find_blocks(self) -> dict[str, str]:
        holders = {root for layer in self.linears() for root in ancestors(layer.path)}
        blocks: dict[str, str] = {}
        for path in self.modules:
            if not any(root in blocks for root in ancestors(path + ".*")):
                for block in self._innermost(path, holders):
                    blocks[block] = re.sub(r"(?<![^.])\d+(?![^.])", "*", block)
        return blocks

    def _innermost(self, path: str, holders: set[str]) -> list[str]:
        """Return the blocks of the list at `path`; if its members are stages (Swin, SegFormer), the stages' blocks."""
        members = self._members(path, holders)
        nested = [below for member in members for below in self.below(member)]
        lists = [p for p in nested if len({type(self.modules[m]) for m in self._members(p, holders)}) == 1]
        alike = {pattern_of(f"{p}.*") for p in lists}  # a stage may have one block where its siblings have several
        lists = [p for p in nested if pattern_of(f"{p}.*") in alike]
        inner = [block for p in lists for block in self._members(p, holders, least=1)]
        if len({pattern_of(f"{block.rpartition('.')[0]}.*") for block in inner}) != 1:
            return members
        patterns = _patterns(layer for member in members for layer in self.linears(member))
        inner_patterns = _patterns(layer for block in inner for layer in self.linears(block))
        # a block has more layers outside of its (expert) list than inside; a stage has nearly all layers in its list
        return inner if len(patterns - inner_patterns) < len(inner_patterns) else members

    def _members(self, path: str, holders: set[str], least: int = 2) -> list[str]:
        """Return the paths of the blocks in the list at `path`; empty if it is not a block list.

        Args:
            path: Path of a module.
            holders: Paths of modules with linear layers.
            least: Smallest number of members for a Sequential to count as a list.
        """
        module = self.modules.get(path)
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            return []
        members = [f"{path}.{name}" if path else name for name, _ in module.named_children()]
        members = [member for member in members if member in self.modules and member in holders]
        if isinstance(module, nn.ModuleList):
            return members
        same = len({type(self.modules[member]) for member in members}) == 1
        return members if same and len(members) == len(module) >= least else []


def _kind_or_pointwise(layer: AdaptableLayer) -> str:
    """Return the layer's kind; "pointwise" for a convolution with kernel size 1."""
    return "pointwise" if isinstance(layer.module, nn.Conv1d) and layer.module.kernel_size == (1,) else layer.kind


def _patterns(layers: Iterable[AdaptableLayer]) -> set[str]:
    return {pattern_of(layer.path) for layer in layers}


def width_of(layers: Iterable[AdaptableLayer], norms: Iterable[int] = ()) -> int:
    """Return the most frequent input or output size of some layers, their likely residual width; 0 for no layers.

    Args:
        layers: The layers.
        norms: Sizes of norms among them; a norm counts twice, because in a Mamba block more layers have the inner size
            than the residual width.
    """
    sizes = Counter(size for layer in layers for size in (layer.in_features, layer.out_features))
    if sizes:
        sizes.update({size: 2 * count for size, count in Counter(norms).items() if size in sizes})
    return sizes.most_common(1)[0][0] if sizes else 0


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()
