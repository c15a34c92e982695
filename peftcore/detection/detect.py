"""Architecture detection: what a model is and where adapters go, read from its structure and not from a table of names.

Works on any `nn.Module`, on the meta device, on quantised models and on models that already carry adapters.
`module_tree` reads the tree, `roles` says what a block's layers do; here the whole is put together.
"""

from collections import Counter
from dataclasses import replace

from torch import nn
from transformers.pytorch_utils import Conv1D

from peftcore.detection.architecture import Architecture, LinearInfo, NormInfo
from peftcore.detection.attention import attention_roles
from peftcore.detection.experts import find_experts
from peftcore.detection.feed_forward import feed_forward_roles
from peftcore.detection.kind import head_paths, model_kind, vocab_size
from peftcore.detection.module_tree import AdapterSlot, ModuleTree, pattern_of
from peftcore.detection.names import shortest_names
from peftcore.detection.norms import find_norms
from peftcore.detection.parameters import expert_stacks, shared_parameters, unique_parameters
from peftcore.detection.prefix import find_prefix
from peftcore.detection.roles import FEED_FORWARD, Role, Roles, mixer_sites, router_sites
from peftcore.detection.trunk import find_trunk, is_packable, token_embedding
from peftcore.errors import TargetError


def detect(model: nn.Module) -> Architecture:
    """What `model` is and where adapters go in it; reads shapes only, so weights may be on the meta device.

    Raises TargetError where nothing can carry an adapter, saying what the model is made of.
    """
    tree = ModuleTree(model)
    roles = _all_roles(model, tree)
    _require_something_adaptable(model, tree, roles)
    tied = shared_parameters(model)
    names = {name: [tree.sites[path] for path in paths] for name, paths in shortest_names(tree, roles).items()}
    fixed = {name.rpartition(".")[0] for group in tied for name in group if name.endswith("weight")}
    modules = {name: _linear_info(sites, roles, fixed) for name, sites in names.items()}
    linear = tuple(name for name, sites in names.items() if sites[0].kind == "linear")
    family = str(getattr(getattr(model, "config", None), "model_type", "") or type(model).__name__)
    blocks = tuple(tree.block_lists())
    trunk = find_trunk(model, tree, roles, blocks)
    embedding = token_embedding(model, tree)
    token_dim = tree.sites[embedding].out_features if embedding else trunk.hidden_size if trunk else 0
    sizes = _parameter_sizes(model, tree)
    quantizable = tuple(name for name in linear if modules[name].quantizable)
    in_four_bits = sum(s.in_features * s.out_features for name in quantizable for s in names[name])
    found = Architecture(
        family=family,
        class_name=type(model).__name__,
        kind=model_kind(model, tree, roles, blocks),
        num_blocks=blocks[0].count if blocks else 0,
        block_pattern=blocks[0].pattern if blocks else None,
        blocks=blocks,
        hidden_size=trunk.hidden_size if trunk else None,
        vocab_size=vocab_size(model, tree),
        target_modules=modules,
        experts=find_experts(tree),
        tied_weights=tied,
        norms={name: _norm_info(paths, tree) for name, paths in find_norms(tree).items()},
        prefix=find_prefix(model, tree, roles, trunk, token_dim) if trunk else None,
        packable=is_packable(model, tree, roles, trunk, family),
        default_targets=(),
        feedforward_modules=(),
        all_linear=tuple(name for name in linear if modules[name].role != "head"),
        feed_forward=tuple(name for name in linear if modules[name].role in FEED_FORWARD),
        quantizable=quantizable,
        parameters=sum(sizes.values()),
        dtypes=dict(sizes),
        memory_bfloat16=2 * sum(sizes.values()),
        memory_nf4=2 * (sum(sizes.values()) - in_four_bits) + round(in_four_bits * 4.127 / 8),
        unreached=_unreached(model, tree),
    )
    scaled = [name for name in found.targets_for("IA3") if modules[name].role == "down"]
    return replace(found, default_targets=tuple(found.targets_for("LORA")), feedforward_modules=tuple(scaled))


# -- roles of the whole model ------------------------------------------------------------------------------------


def _all_roles(model: nn.Module, tree: ModuleTree) -> Roles:
    roles: Roles = {}
    for root in tree.blocks:
        roles |= _block_roles(tree, root)
    outside = attention_roles(tree, "")
    roles |= {path: role for path, role in outside.items() if tree.block_of(path) is None}
    roles |= dict.fromkeys(head_paths(model, tree), "head")
    return {site.path: roles.get(site.path, _kind_role(site)) for site in tree.sites.values()}


def _kind_role(site: AdapterSlot) -> Role:
    if getattr(site.layer, "groups", 1) > 1:
        return "grouped_convolution"
    other: dict[str, Role] = {"linear": "unknown", "conv": "convolution", "embedding": "embedding"}
    return other[site.kind]


def _block_roles(tree: ModuleTree, root: str) -> Roles:
    sites = tree.linears(root)
    if not sites:
        return {}
    width = tree.width(root)
    roles = attention_roles(tree, root, width)
    for site in mixer_sites(tree, root):
        roles.setdefault(site.path, "mixer")
    roles |= feed_forward_roles(tree, root, [site for site in sites if site.path not in roles], width)
    # last, because an MLP's inner size may happen to be the number of experts
    routers = [site for site in router_sites(tree, root) if site.path not in roles]
    roles |= dict.fromkeys((site.path for site in routers), "router")
    return roles


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


def _linear_info(sites: list[AdapterSlot], roles: Roles, fixed: set[str]) -> LinearInfo:
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


def _is_plain_linear(site: AdapterSlot) -> bool:
    # transformers exchanges exactly these for bitsandbytes' linears; a subclass has a forward of its own
    return site.kind == "linear" and (
        type(site.layer) is nn.Linear
        or isinstance(site.layer, Conv1D)
        or type(site.layer).__module__.startswith("bitsandbytes")
    )


def _norm_info(paths: list[str], tree: ModuleTree) -> NormInfo:
    return NormInfo(tree.norms[paths[0]], len(paths), tuple(dict.fromkeys(pattern_of(path) for path in paths)))


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
    stacks = {id(stack) for module in tree.modules.values() for stack in expert_stacks(module).values()}
    sizes: Counter[str] = Counter()
    for path, _, parameter in unique_parameters(model):
        if path in tree.modules and path not in tree.sites and parameter.ndim >= 2 and id(parameter) not in stacks:
            sizes[type(tree.modules[path]).__name__] += parameter.numel()
    return dict(sizes)
