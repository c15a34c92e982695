"""The module tree of a model as adapters see it: sites, norms and repeated blocks.

Every path is the one the model had before any adapter: a wrapper's `base_layer` is looked through, so a model reads the
same with adapters and without.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property

from torch import nn

from peftcore.bases import base_weight, calls_its_layers, is_adaptable


@dataclass(frozen=True)
class AdapterSlot:
    """One layer that an adapter can sit on."""

    path: str
    layer: nn.Module
    kind: str
    """"linear", "conv" or "embedding"."""
    in_features: int
    out_features: int

    @property
    def parent(self) -> str:
        return self.path.rpartition(".")[0]


@dataclass(frozen=True)
class BlockList:
    """Repeated blocks of one place in the model."""

    pattern: str
    """Path of one block, `*` for an index: "model.layers.*"."""
    count: int
    class_name: str
    """Class of the most frequent block."""
    hidden_size: int
    """Width of the stream through most of the blocks (the stages of a pyramid differ)."""
    paths: tuple[str, ...] = field(repr=False)
    """The blocks, in order of declaration."""


def look_through(module: nn.Module) -> nn.Module:
    """The layer under any number of adapter wrappers."""
    while isinstance(base := getattr(module, "base_layer", None), nn.Module):
        module = base
    return module


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the whole tree in order of declaration; a module registered twice comes twice."""
    module = look_through(module)
    yield path, module
    for name, child in module.named_children():
        if not hasattr(child, "is_no_part_of_the_base"):
            yield from walk(child, f"{path}.{name}" if path else name)


def is_below(path: str, root: str) -> bool:
    """Whether `path` lies strictly inside `root`."""
    return path != root and (not root or path.startswith(root + "."))


def ancestors(path: str, root: str = "") -> list[str]:
    """Paths strictly between `root` and `path`, outermost first."""
    skip = root.count(".") + 1 if root else 0
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(skip + 1, len(parts))]


def pattern_of(path: str) -> str:
    """`path` with every index but a last one as `*`: layers that differ only in their block are one pattern."""
    return re.sub(r"(?<![^.])\d+(?=\.)", "*", path)


class ModuleTree:
    """A model's modules by path (the first path of a shared module), its sites and its blocks."""

    def __init__(self, model: nn.Module):
        self.modules: dict[str, nn.Module] = {}
        self.sites: dict[str, AdapterSlot] = {}
        self.norms: dict[str, int] = {}
        """{path of a norm that can be adapted: its size}"""
        seen: set[int] = set()
        for path, module in walk(model):
            if id(module) not in seen:
                seen.add(id(module))
                self.modules[path] = module
                if path and is_adaptable(module) and calls_its_layers(self.modules[path.rpartition(".")[0]]):
                    base = base_weight(module, path)
                    if base.kind == "norm":
                        self.norms[path] = int(base.in_features)
                    else:
                        self.sites[path] = AdapterSlot(
                            path, module, base.kind, int(base.in_features), int(base.out_features)
                        )
        self._order = list(self.modules)
        self._position = {path: position for position, path in enumerate(self._order)}
        self._block_kinds = {"linear"}
        self.blocks: dict[str, str] = self._find_blocks()
        """{path of one block: pattern of its list}"""
        if not self.blocks:  # SqueezeBERT's blocks have convolutions of kernel 1 in the place of linear layers
            self._block_kinds = {"linear", "pointwise"}
            self.blocks = self._find_blocks()

    def below(self, root: str) -> Iterator[str]:
        """Paths strictly inside `root`, in order of declaration."""
        later = itertools.islice(self._order, self._position[root] + 1, None)
        return itertools.takewhile(lambda path: is_below(path, root), later)

    def linears(self, root: str = "") -> list[AdapterSlot]:
        """Linear sites strictly inside `root`, in order of declaration."""
        sites = (self.sites[path] for path in self.below(root) if path in self.sites)
        return [site for site in sites if _mixes_features_only(site) in self._block_kinds]

    def parent_of(self, site: AdapterSlot) -> nn.Module:
        return self.modules[site.parent]

    def block_of(self, path: str) -> str | None:
        return next((root for root in ancestors(path) if root in self.blocks), None)

    def width(self, root: str) -> int:
        """Size of the residual stream through the block at `root`; 0 for a block without linear sites."""
        norms = []
        for path in self.below(root):
            weight = getattr(self.modules[path], "weight", None)
            if isinstance(weight, nn.Parameter) and weight.ndim == 1 and _is_norm(self.modules[path]):
                norms.append(weight.shape[0])
        return width_of(self.linears(root), norms)

    def block_lists(self) -> list[BlockList]:
        """Every list of repeated blocks, the one with most weights first."""
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
        """`width`, but where several sizes go in and out of the block's layers, the one that also stands outside.

        The layers inside a bottleneck (MobileBERT) or on several streams at once (hyper-connections) are not as wide
        as what passes from block to block.
        """
        sites, width = self.linears(root), self.width(root)
        both = {site.in_features for site in sites} & {site.out_features for site in sites}
        outside = self._sizes_around(root.rpartition(".")[0])
        votes = {size: count for size, count in outside.items() if size in both}
        most = max(votes.values(), default=0)
        return width if votes.get(width, 0) == most else next(size for size, count in votes.items() if count == most)

    @cache  # noqa: B019 - a tree lives as long as one call of `detect`
    def _sizes_around(self, path: str) -> Counter[int]:
        """How often each size is that of an embedding or a norm outside the blocks, in the tower of a list of blocks.

        The tower is the smallest part of the model around it with an input layer of its own.
        """
        for tower in [*reversed(ancestors(f"{path}.*")), ""]:
            inside = [p for p in self._outside if is_below(p, tower)]
            if any(p in self.sites and self.sites[p].kind != "linear" for p in inside):
                tables = [p for p in inside if p in self.sites and self.sites[p].kind == "embedding"]
                # a norm may stand where several streams lie side by side, so a table counts for more
                return Counter(self._outside[p] for p in [*tables, *tables, *(p for p in inside if p in self.norms)])
        return Counter()

    @cached_property
    def _outside(self) -> dict[str, int]:
        """{path: output size} of what lies in no block."""
        sizes = {path: site.out_features for path, site in self.sites.items()} | self.norms
        return {path: size for path, size in sizes.items() if self.block_of(path) is None}

    def _find_blocks(self) -> dict[str, str]:
        holders = {root for site in self.linears() for root in ancestors(site.path)}
        found: dict[str, str] = {}
        for path in self.modules:
            if not any(root in found for root in ancestors(path + ".*")):
                for block in self._innermost(path, holders):
                    found[block] = re.sub(r"(?<![^.])\d+(?![^.])", "*", block)
        return found

    def _innermost(self, path: str, holders: set[str]) -> list[str]:
        """Blocks of the list at `path`; of its stages' own lists where the members are stages (Swin, SegFormer)."""
        members = self._members(path, holders)
        nested = [below for member in members for below in self.below(member)]
        lists = [p for p in nested if len({type(self.modules[m]) for m in self._members(p, holders)}) == 1]
        alike = {pattern_of(f"{p}.*") for p in lists}  # a stage may have one block where its siblings have several
        lists = [p for p in nested if pattern_of(f"{p}.*") in alike]
        inner = [block for p in lists for block in self._members(p, holders, least=1)]
        if len({pattern_of(f"{block.rpartition('.')[0]}.*") for block in inner}) != 1:
            return members
        own = _patterns(s for m in members for s in self.linears(m))
        nested_own = _patterns(s for b in inner for s in self.linears(b))
        # a block keeps more layers beside its list (of experts) than in it; a stage is little but its list
        return inner if len(own - nested_own) < len(nested_own) else members

    def _members(self, path: str, holders: set[str], least: int = 2) -> list[str]:
        """Paths of the blocks in the list at `path`; empty where it is no list of blocks.

        least: how many a Sequential needs to be taken for a list.
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


def _mixes_features_only(site: AdapterSlot) -> str:
    """The site's kind, "pointwise" for a convolution of kernel 1."""
    return "pointwise" if isinstance(site.layer, nn.Conv1d) and site.layer.kernel_size == (1,) else site.kind


def _patterns(sites: Iterable[AdapterSlot]) -> set[str]:
    return {pattern_of(site.path) for site in sites}


def width_of(sites: Iterable[AdapterSlot], norms: Iterable[int] = ()) -> int:
    """Size of the residual stream through some layers; 0 for no layers.

    It is what most of them read or write, and what the norms around them have; a norm counts twice, because in a
    Mamba block more layers have the inner size than the outer.
    """
    sizes = Counter(size for site in sites for size in (site.in_features, site.out_features))
    if sizes:
        sizes.update({size: 2 * count for size, count in Counter(norms).items() if size in sizes})
    return sizes.most_common(1)[0][0] if sizes else 0


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()
