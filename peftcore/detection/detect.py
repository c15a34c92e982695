"""Architecture detection: what a model is and where adapters go, read from its structure and not from a table of names.

Works on any `nn.Module`, on the meta device, on quantised models and on models that already carry adapters.
`module_tree` reads the tree, `roles` says what a block's layers do; here the whole is put together.
"""

from collections import Counter

from torch import nn
from transformers.pytorch_utils import Conv1D

from peftcore.detection.architecture import Architecture, LinearInfo
from peftcore.detection.experts import find_experts
from peftcore.detection.kind import head_paths, model_kind, vocab_size
from peftcore.detection.module_tree import (
    BlockList,
    ModuleTree,
    Site,
    expert_stacks,
    pattern_of,
    shared_parameters,
    unique_parameters,
)
from peftcore.detection.roles import Role, Roles, attention_roles, block_roles
from peftcore.errors import TargetError

CURATED_TARGETS: dict[str, tuple[Role, ...]] = {
    "phi": ("query", "value", "up", "down"),
    "nemotron_h": ("query", "key", "value", "output"),
    "rwkv": ("query", "key", "value", "output", "up", "down", "unknown"),
}
"""Roles of the default LoRA targets where practice differs from query and value (families of HF PEFT's mapping)."""

_MLP: tuple[Role, ...] = ("gate", "up", "down", "fused_gate_up")


def detect(model: nn.Module) -> Architecture:
    """What `model` is and where adapters go in it; reads shapes only, so weights may be on the meta device.

    Raises TargetError where nothing can carry an adapter, saying what the model is made of.
    """
    tree = ModuleTree(model)
    roles = _all_roles(model, tree)
    _require_something_adaptable(model, tree, roles)
    tied = shared_parameters(model)
    names = _target_names(tree, roles)
    fixed = {name.rpartition(".")[0] for group in tied for name in group if name.endswith("weight")}
    modules = {name: _linear_info(sites, roles, fixed) for name, sites in names.items()}
    linear = tuple(name for name, sites in names.items() if sites[0].kind == "linear")
    family = str(getattr(getattr(model, "config", None), "model_type", "") or type(model).__name__)
    blocks = tuple(tree.block_lists())
    sizes = _parameter_sizes(model, tree)
    quantizable = tuple(name for name in linear if modules[name].quantizable)
    in_four_bits = sum(s.in_features * s.out_features for name in quantizable for s in names[name])
    return Architecture(
        family=family,
        class_name=type(model).__name__,
        kind=model_kind(model, tree, roles, blocks),
        num_blocks=blocks[0].count if blocks else 0,
        block_pattern=blocks[0].pattern if blocks else None,
        blocks=blocks,
        hidden_size=blocks[0].hidden_size if blocks else None,
        vocab_size=vocab_size(model, tree),
        target_modules=modules,
        experts=find_experts(tree),
        tied_weights=tied,
        default_targets=_default_targets(family, modules, blocks),
        all_linear=tuple(name for name in linear if modules[name].role != "head"),
        feed_forward=tuple(name for name in linear if modules[name].role in _MLP),
        quantizable=quantizable,
        parameters=sum(sizes.values()),
        dtypes=dict(sizes),
        memory_bfloat16=2 * sum(sizes.values()),
        memory_nf4=2 * (sum(sizes.values()) - in_four_bits) + round(in_four_bits * 4.127 / 8),
        unreached=_unreached(model, tree),
    )


# -- roles of the whole model ------------------------------------------------------------------------------------


def _all_roles(model: nn.Module, tree: ModuleTree) -> Roles:
    roles: Roles = {}
    for root in tree.blocks:
        roles |= block_roles(tree, root)
    outside = attention_roles(tree, "")
    roles |= {path: role for path, role in outside.items() if tree.block_of(path) is None}
    roles |= dict.fromkeys(head_paths(model, tree), "head")
    other: dict[str, Role] = {"linear": "unknown", "conv": "convolution", "embedding": "embedding"}
    return {site.path: roles.get(site.path, other[site.kind]) for site in tree.sites.values()}


def _require_something_adaptable(model: nn.Module, tree: ModuleTree, roles: Roles) -> None:
    if any(role not in ("head", "embedding") for role in roles.values()) or find_experts(tree):
        return
    counts = Counter(type(module).__name__ for path, module in tree.modules.items() if path)
    found = ", ".join(f"{count} {name}" for name, count in counts.most_common(8)) or "no submodules"
    raise TargetError(
        f"{type(model).__name__} has no layer to adapt: found {found}. Adapters go on Linear, Conv1D, "
        "Conv1d/2d/3d and bitsandbytes' linears inside the model; wrap a lone layer in a module, or name an "
        "embedding or a head in target_modules yourself"
    )


# -- names -------------------------------------------------------------------------------------------------------


def _target_names(tree: ModuleTree, roles: Roles) -> dict[str, list[Site]]:
    """{name: sites}: for each layer the shortest end of its path that reaches layers of one role only."""
    patterns: dict[str, list[Site]] = {}
    for site in tree.sites.values():
        patterns.setdefault(pattern_of(site.path), []).append(site)
    role_of: dict[str, set[Role | None]] = {}
    for path in tree.modules:
        ends = role_of.setdefault(pattern_of(path), set())
        ends.add(roles.get(path))
    by_end: dict[str, set[Role | None]] = {}
    for pattern, found in role_of.items():
        for end in _ends(pattern):
            by_end.setdefault(end, set()).update(found)
    names: dict[str, list[Site]] = {}
    for pattern, sites in patterns.items():
        own = role_of[pattern]
        name = next((end for end in _ends(pattern) if by_end[end] == own), pattern)
        names.setdefault(name, []).extend(sites)
    return names


def _ends(pattern: str) -> list[str]:
    """Every end of a path, shortest first: `a.b.c` → `c`, `b.c`, `a.b.c`."""
    parts = pattern.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts))) if parts[start] != "*"]


def _linear_info(sites: list[Site], roles: Roles, fixed: set[str]) -> LinearInfo:
    shapes = Counter((site.in_features, site.out_features) for site in sites).most_common()
    role = roles[sites[0].path]
    fits = all(_is_plain_linear(site) and site.in_features % 64 == 0 for site in sites)
    return LinearInfo(
        role=role,
        in_features=shapes[0][0][0],
        out_features=shapes[0][0][1],
        count=len(sites),
        shapes=tuple((size[0], size[1], count) for size, count in shapes),
        patterns=tuple(dict.fromkeys(pattern_of(site.path) for site in sites)),
        quantizable=fits and role != "head" and not any(site.path in fixed for site in sites),
    )


def _is_plain_linear(site: Site) -> bool:
    # transformers exchanges exactly these for bitsandbytes' linears; a subclass has a forward of its own
    return site.kind == "linear" and (
        type(site.layer) is nn.Linear
        or isinstance(site.layer, Conv1D)
        or type(site.layer).__module__.startswith("bitsandbytes")
    )


def _default_targets(family: str, modules: dict[str, LinearInfo], blocks: tuple[BlockList, ...]) -> tuple[str, ...]:
    """Query and value; in a model without attention what reads the block's width in a mixer, else all inside."""

    def having(*roles: Role) -> tuple[str, ...]:
        return tuple(name for name, info in modules.items() if info.role in roles)

    attention = having(*CURATED_TARGETS.get(family, ("query", "value", "fused_qkv")))
    if not any(modules[name].role in ("value", "fused_qkv") for name in attention):
        attention += having("fused_kv")
    # fused kernels read the weights of a mixer's later layers without calling them
    widths = {block.hidden_size for block in blocks}
    mixers = tuple(name for name in having("mixer") if modules[name].in_features in widths)
    return attention or mixers or having("gate", "up", "down", "fused_gate_up", "unknown") or having("convolution")


# -- figures -----------------------------------------------------------------------------------------------------


def _parameter_sizes(model: nn.Module, tree: ModuleTree) -> Counter[str]:
    """{dtype: weights}, tied ones once; a packed 4-bit matrix counts as what it stands for."""
    sizes: Counter[str] = Counter()
    for path, name, parameter in unique_parameters(model):
        site = tree.sites.get(path)
        dense = site.in_features * site.out_features if site and site.kind == "linear" and name == "weight" else None
        sizes[str(parameter.dtype).removeprefix("torch.")] += dense or parameter.numel()
    return sizes


def _unreached(model: nn.Module, tree: ModuleTree) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for path, _, parameter in unique_parameters(model):
        module = tree.modules.get(path)
        if module is not None and path not in tree.sites and parameter.ndim >= 2 and not expert_stacks(module):
            sizes[type(module).__name__] += parameter.numel()
    return dict(sizes)
