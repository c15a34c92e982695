"""The module tree of a model as adapters see it: sites, repeated blocks, expert weights, shared parameters.

Every path is the one the model had before any adapter: a host's `base_layer` is looked through, so a model reads the
same with adapters and without.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from peftcore.bases import base_weight, is_adaptable


@dataclass(frozen=True)
class Site:
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
    """Width of the residual stream in most of the blocks (the stages of a pyramid differ)."""


def look_through(module: nn.Module) -> nn.Module:
    """The layer under any number of adapter hosts."""
    while isinstance(base := getattr(module, "base_layer", None), nn.Module):
        module = base
    return module


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the whole tree in order of declaration; a module registered twice comes twice."""
    module = look_through(module)
    yield path, module
    for name, child in module.named_children():
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
        self.sites: dict[str, Site] = {}
        seen: set[int] = set()
        for path, module in walk(model):
            if id(module) not in seen:
                seen.add(id(module))
                self.modules[path] = module
                if path and is_adaptable(module) and not self._bypassed(path):
                    base = base_weight(module, path)
                    self.sites[path] = Site(path, module, base.kind, int(base.in_features), int(base.out_features))
        self._order = list(self.modules)
        self._position = {path: position for position, path in enumerate(self._order)}
        self.blocks: dict[str, str] = self._find_blocks()
        """{path of one block: pattern of its list}"""

    def _bypassed(self, path: str) -> bool:
        # nn.MultiheadAttention multiplies by out_proj.weight itself and never calls out_proj
        return isinstance(self.modules[path.rpartition(".")[0]], nn.MultiheadAttention)

    def below(self, root: str) -> Iterator[str]:
        """Paths strictly inside `root`, in order of declaration."""
        later = itertools.islice(self._order, self._position[root] + 1, None)
        return itertools.takewhile(lambda path: is_below(path, root), later)

    def linears(self, root: str = "") -> list[Site]:
        """Linear sites strictly inside `root`, in order of declaration."""
        sites = (self.sites[path] for path in self.below(root) if path in self.sites)
        return [site for site in sites if site.kind == "linear"]

    def parent_of(self, site: Site) -> nn.Module:
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
        widths = Counter(self.width(path) for path in paths)
        return BlockList(pattern, len(paths), classes.most_common(1)[0][0], widths.most_common(1)[0][0])

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
        inner = [
            block
            for member in members
            for nested in self.modules
            if is_below(nested, member) and len({type(self.modules[m]) for m in self._members(nested, holders)}) == 1
            for block in self._members(nested, holders)
        ]
        if len({pattern_of(f"{block.rpartition('.')[0]}.*") for block in inner}) != 1:
            return members
        own = _patterns(s for m in members for s in self.linears(m))
        nested_own = _patterns(s for b in inner for s in self.linears(b))
        # a block keeps more layers beside its list (of experts) than in it; a stage is little but its list
        return inner if len(own - nested_own) < len(nested_own) else members

    def _members(self, path: str, holders: set[str]) -> list[str]:
        """Paths of the blocks in the list at `path`; empty where it is no list of blocks."""
        module = self.modules.get(path)
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            return []
        members = [f"{path}.{name}" if path else name for name, _ in module.named_children()]
        members = [member for member in members if member in self.modules and member in holders]
        if isinstance(module, nn.ModuleList):
            return members
        same = len({type(self.modules[member]) for member in members}) == 1
        return members if same and len(members) == len(module) > 1 else []


def _patterns(sites: Iterable[Site]) -> set[str]:
    return {pattern_of(site.path) for site in sites}


def width_of(sites: Iterable[Site], norms: Iterable[int] = ()) -> int:
    """Size of the residual stream through some layers; 0 for no layers.

    It is what most of them read or write, and what the norms around them have; a norm counts twice, because in a
    Mamba block more layers have the inner size than the outer.
    """
    sizes = Counter(size for site in sites for size in (site.in_features, site.out_features))
    if sizes:
        sizes.update({size: 2 * count for size, count in Counter(norms).items() if size in sizes})
    return sizes.most_common(1)[0][0] if sizes else 0


def expert_stacks(module: nn.Module) -> dict[str, nn.Parameter]:
    """Raw expert weights of a module: two or more parameters (experts, ·, ·); {} for a module without."""
    if any(isinstance(child, nn.Conv1d) for child in module.children()):
        return {}  # a mixer with heads in the place of experts
    stacks = {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == 3 and min(p.shape) > 1}
    return stacks if len(stacks) > 1 and len({p.shape[0] for p in stacks.values()}) == 1 else {}


def expert_count(module: nn.Module) -> int:
    """Experts that a module holds, as raw stacks or as a list of MLPs; 0 for any other module."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        experts = list(module.children())
        same = len({type(expert) for expert in experts}) == 1
        return len(experts) if same and any(True for _ in experts[0].children()) else 0
    return next((stack.shape[0] for stack in expert_stacks(module).values()), 0)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _named_parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(path of the module, name in it, parameter), a shared one once for each of its names."""
    for path, module in walk(model):
        for name, parameter in module.named_parameters(recurse=False):
            yield path, name, parameter


def unique_parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(path of the module, name in it, parameter) of the base model, a shared one under its first name."""
    seen: set[int] = set()
    for path, name, parameter in _named_parameters(model):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield path, name, parameter


def shared_parameters(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Groups of names that are one and the same parameter (tied weights), names as before any adapter."""
    names: dict[int, list[str]] = {}
    for path, name, parameter in _named_parameters(model):
        names.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)
