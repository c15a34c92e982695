"""Architecture detection: what a model is and where adapters go, read from its structure and not from a table of names.

Works on any `nn.Module`, on the meta device, on quantised models and on models that already carry adapters.
`module_tree` reads the tree, `detect_roles` says what a block's layers do; here the whole is put together.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftcore.detect_roles import Role, Roles, attention_roles, block_roles, expert_count
from peftcore.errors import TargetError
from peftcore.module_tree import (
    BlockList,
    ModuleTree,
    Site,
    ancestors,
    is_below,
    pattern_of,
    shared_parameters,
    width_of,
)

CURATED_TARGETS: dict[str, tuple[Role, ...]] = {
    "phi": ("query", "value", "up", "down"),
    "nemotron_h": ("query", "key", "value", "output"),
    "rwkv": ("query", "key", "value", "output"),
}
"""Roles of the default LoRA targets where practice differs from query and value (families of HF PEFT's mapping)."""

_MLP: tuple[Role, ...] = ("gate", "up", "down", "fused_gate_up")


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
    vocab_size: int | None
    target_modules: dict[str, LinearInfo]
    """{name for `target_modules`: what it reaches}; a name with `*` works through `target_regex` only."""
    experts: dict[str, ExpertInfo]
    tied_weights: tuple[tuple[str, ...], ...]
    """Groups of names that are one parameter."""
    default_targets: tuple[str, ...]
    """For LoRA: query and value, or the fused projection."""
    all_linear: tuple[str, ...]
    """Every linear-like layer except the head."""
    feed_forward: tuple[str, ...]
    """The MLPs' layers."""
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

    def target_regex(self, names: Iterable[str]) -> str:
        """One regular expression for `target_modules` that matches exactly these names' layers."""
        patterns = [pattern for name in names for pattern in self.target_modules[name].patterns]
        return "|".join(re.escape(pattern).replace(r"\*", r"\d+") for pattern in patterns)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and scalars, for JSON."""
        return asdict(self)


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
    sizes = _parameter_sizes(tree)
    quantizable = tuple(name for name in linear if modules[name].quantizable)
    in_four_bits = sum(s.in_features * s.out_features for name in quantizable for s in names[name])
    return Architecture(
        family=family,
        class_name=type(model).__name__,
        kind=_kind(model, tree, roles, blocks),
        num_blocks=blocks[0].count if blocks else 0,
        block_pattern=blocks[0].pattern if blocks else None,
        blocks=blocks,
        hidden_size=_hidden_size(tree, blocks),
        vocab_size=_vocab_size(model, tree, roles),
        target_modules=modules,
        experts=_experts(tree),
        tied_weights=tied,
        default_targets=_default_targets(family, modules, linear),
        all_linear=tuple(name for name in linear if modules[name].role != "head"),
        feed_forward=tuple(name for name in linear if modules[name].role in _MLP),
        quantizable=quantizable,
        parameters=sum(sizes.values()),
        dtypes=dict(sizes),
        memory_bfloat16=2 * sum(sizes.values()),
        memory_nf4=2 * (sum(sizes.values()) - in_four_bits) + round(in_four_bits * 4.127 / 8),
        unreached=_unreached(tree),
    )


# -- roles of the whole model ------------------------------------------------------------------------------------


def _all_roles(model: nn.Module, tree: ModuleTree) -> Roles:
    roles: Roles = {}
    for root in tree.blocks:
        roles |= block_roles(tree, root)
    outside = [site for site in tree.linears() if site.path not in roles and tree.block_of(site.path) is None]
    if outside:
        found = attention_roles(tree, "", width_of(outside))
        roles |= {site.path: found[site.path] for site in outside if site.path in found}
    roles |= dict.fromkeys(_heads(model, tree), "head")
    other: dict[str, Role] = {"linear": "unknown", "conv": "convolution", "embedding": "embedding"}
    return {site.path: roles.get(site.path, other[site.kind]) for site in tree.sites.values()}


def _heads(model: nn.Module, tree: ModuleTree) -> list[str]:
    """Layers that give the model's answer: the output embeddings, else a task's layers outside the base model."""
    outside = [site for site in tree.linears() if tree.block_of(site.path) is None]
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if head is not None:
        paths = [site.path for site in outside if head in (site.layer, _at(model, site.path))]
        if paths:
            return paths
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and prefix in tree.modules:
        return [site.path for site in outside if not is_below(site.path, prefix)]
    if prefix or not tree.blocks:
        return []
    last_block = list(tree.modules).index(list(tree.blocks)[-1])
    after = [site for site in outside if list(tree.modules).index(site.path) > last_block]
    return [site.path for site in after if "." not in site.path][-1:]


def _at(model: nn.Module, path: str) -> nn.Module | None:
    """The module that holds `path`'s place, an adapter's host included."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _require_something_adaptable(model: nn.Module, tree: ModuleTree, roles: Roles) -> None:
    if any(role not in ("head", "embedding") for role in roles.values()) or _experts(tree):
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
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]


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


def _default_targets(family: str, modules: dict[str, LinearInfo], linear: tuple[str, ...]) -> tuple[str, ...]:
    wanted = CURATED_TARGETS.get(family, ("query", "value", "fused_qkv"))
    found = tuple(name for name, info in modules.items() if info.role in wanted)
    if found and not any(modules[name].role in ("value", "fused_qkv") for name in found):
        found += tuple(name for name, info in modules.items() if info.role == "fused_kv")
    inside = tuple(name for name in linear if modules[name].role not in ("head", "router"))
    return found or inside or tuple(name for name, info in modules.items() if info.role == "convolution")


# -- figures -----------------------------------------------------------------------------------------------------


def _hidden_size(tree: ModuleTree, blocks: tuple[BlockList, ...]) -> int | None:
    if not blocks:
        return None
    sites = [
        s for path, pattern in tree.blocks.items() if pattern == blocks[0].pattern for s in tree.linears(path)
    ]
    return width_of(sites)


def _vocab_size(model: nn.Module, tree: ModuleTree, roles: Roles) -> int | None:
    """Rows of the token embedding: the one the model names, else the largest outside the blocks."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        size = getattr(getter(), "num_embeddings", None) if callable(getter) else None
    except (AttributeError, NotImplementedError):  # models without tokens have no such layer and say so thus
        size = None
    if size is not None or callable(getter):
        return size
    tables = [
        s.in_features for s in tree.sites.values() if s.kind == "embedding" and not tree.block_of(s.path)
    ]
    return max(tables, default=None)


def _kind(model: nn.Module, tree: ModuleTree, roles: Roles, blocks: tuple[BlockList, ...]) -> str:
    config = getattr(model, "config", None)
    places = [set(block.pattern.split(".")) for block in blocks]
    both = any("encoder" in place for place in places) and any("decoder" in place for place in places)
    if getattr(config, "is_encoder_decoder", both):
        return "encoder-decoder"
    generates = getattr(model, "can_generate", None)
    causal = any(getattr(module, "is_causal", False) is True for module in tree.modules.values())
    if causal or (callable(generates) and generates()) or _has_causal_head_only(config):
        return "causal decoder"
    if getattr(model, "main_input_name", None) == "pixel_values" or _embeds_patches(tree):
        return "vision encoder"
    attends = any(role in ("query", "fused_qkv") for role in roles.values()) or any(
        isinstance(module, nn.MultiheadAttention) for module in tree.modules.values()
    )
    return "encoder" if attends and blocks else "other"


def _has_causal_head_only(config: Any) -> bool:
    """Headless models of a family that transformers knows with a causal head and with no masked one (Mamba)."""
    from transformers.models.auto import modeling_auto as auto

    family = getattr(config, "model_type", None)
    return (
        family in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and family not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )


def _embeds_patches(tree: ModuleTree) -> bool:
    convolutions = [
        site.layer
        for site in tree.sites.values()
        if isinstance(site.layer, nn.Conv2d) and tree.block_of(site.path) is None
    ]
    return bool(tree.blocks) and any(layer.kernel_size == layer.stride for layer in convolutions)


def _experts(tree: ModuleTree) -> dict[str, ExpertInfo]:
    """Raw expert weights by parameter name, those of one name and shape together."""
    found: dict[str, list[ExpertInfo]] = {}
    for path, module in tree.modules.items():
        if expert_count(module) and not isinstance(module, nn.ModuleList):
            block = tree.block_of(path)
            stacks = {n: p for n, p in module.named_parameters(recurse=False) if p.ndim == 3}
            width = _expert_width(tree, block or "", [tuple(p.shape) for p in stacks.values()])
            for name, parameter in stacks.items():
                info = _expert_info(module, parameter, width, [tuple(p.shape) for p in stacks.values()])
                if info is not None:
                    found.setdefault(f"{path.rpartition('.')[2]}.{name}", []).append(info)
    return {name: _counted(infos) for name, infos in found.items()}
