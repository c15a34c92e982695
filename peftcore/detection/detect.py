"""`detect`: read a model's architecture from its module tree, without a table of model names.

Detection works on any `nn.Module`, on the meta device, on quantised models and on models with adapters. `module_tree`
finds layers and repeated blocks, `attention`, `feed_forward` and `roles` find each layer's role. This module combines
their results into an `Architecture`.
"""

from collections import Counter
from dataclasses import replace

from torch import nn
from transformers.pytorch_utils import Conv1D

from peftcore.bases import GgufLinear, refusal
from peftcore.detection.architecture import Architecture, LinearInfo, NormInfo
from peftcore.detection.attention import attention_roles
from peftcore.detection.experts import find_experts
from peftcore.detection.feed_forward import feed_forward_roles
from peftcore.detection.head import head_paths
from peftcore.detection.model_kind import model_kind
from peftcore.detection.module_tree import AdaptableLayer, ModuleTree, pattern_of
from peftcore.detection.names import norm_names, shortest_names
from peftcore.detection.parameters import expert_stacks, tied_parameters, unique_parameters
from peftcore.detection.prefix import find_prefix
from peftcore.detection.roles import FEED_FORWARD, Role, Roles, mixer_layers, router_layers
from peftcore.detection.trunk import find_trunk, is_packable, token_embedding, vocab_size
from peftcore.errors import TargetError


def detect(model: nn.Module) -> Architecture:
    """Return the architecture of a model: its kind, sizes, blocks, target modules and default targets.

    Only shapes are read, so weights may be on the meta device.

    Args:
        model: Any module; adapter layers in it are ignored.

    Raises:
        TargetError: The model has no layer that an adapter can change.
    """
    tree = ModuleTree(model)
    roles = _all_roles(model, tree)
    _require_something_adaptable(model, tree, roles)
    tied = tied_parameters(model)
    names = {name: [tree.layers[path] for path in paths] for name, paths in shortest_names(tree, roles).items()}
    tied_layers = {name.rpartition(".")[0] for group in tied for name in group if name.endswith("weight")}
    modules = {name: _linear_info(layers, roles, tied_layers) for name, layers in names.items()}
    linear = tuple(name for name, layers in names.items() if layers[0].kind == "linear")
    family = str(getattr(getattr(model, "config", None), "model_type", "") or type(model).__name__)
    blocks = tuple(tree.block_lists())
    trunk = find_trunk(model, tree, roles, blocks)
    embedding = token_embedding(model, tree)
    token_dim = tree.layers[embedding].out_features if embedding else trunk.hidden_size if trunk else 0
    sizes = _parameter_sizes(model, tree)
    quantizable = tuple(name for name in linear if modules[name].quantizable)
    in_four_bits = sum(s.in_features * s.out_features for name in quantizable for s in names[name])
    architecture = Architecture(
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
        norms={name: _norm_info(paths, tree) for name, paths in norm_names(tree).items()},
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
    down = [name for name in architecture.targets_for("IA3") if modules[name].role == "down"]
    default_targets = tuple(architecture.targets_for("LORA"))
    return replace(architecture, default_targets=default_targets, feedforward_modules=tuple(down))


# -- roles of the whole model ------------------------------------------------------------------------------------


def _all_roles(model: nn.Module, tree: ModuleTree) -> Roles:
    """Return the role of every adaptable layer."""
    roles: Roles = {}
    for root in tree.blocks:
        roles |= _block_roles(tree, root)
    outside = attention_roles(tree, "")
    roles |= {path: role for path, role in outside.items() if tree.block_of(path) is None}
    roles |= dict.fromkeys(head_paths(model, tree), "head")
    return {layer.path: roles.get(layer.path, _kind_role(layer)) for layer in tree.layers.values()}


def _kind_role(layer: AdaptableLayer) -> Role:
    """Return the role of a layer that no other rule applies to."""
    if getattr(layer.module, "groups", 1) > 1:
        return "grouped_convolution"
    role_of_kind: dict[str, Role] = {"linear": "unknown", "conv": "convolution", "embedding": "embedding"}
    return role_of_kind[layer.kind]


def _block_roles(tree: ModuleTree, root: str) -> Roles:
    layers = tree.linears(root)
    if not layers:
        return {}
    width = tree.width(root)
    roles = attention_roles(tree, root, width)
    for layer in mixer_layers(tree, root):
        roles.setdefault(layer.path, "mixer")
    roles |= feed_forward_roles(root, [layer for layer in layers if layer.path not in roles], width)
    # routers last, because an MLP's inner size may equal the number of experts
    routers = [layer for layer in router_layers(tree, root) if layer.path not in roles]
    roles |= dict.fromkeys((layer.path for layer in routers), "router")
    return roles


def _require_something_adaptable(model: nn.Module, tree: ModuleTree, roles: Roles) -> None:
    if any(role not in ("head", "embedding") for role in roles.values()) or find_experts(tree):
        return
    counts = Counter(type(module).__name__ for path, module in tree.modules.items() if path)
    contents = ", ".join(f"{count} {name}" for name, count in counts.most_common(8)) or "no submodules"
    reason = next((reason for module in tree.modules.values() if (reason := refusal(module))), None)
    left_out = "" if reason is None else f". A quantised layer was left out: {reason}"
    raise TargetError(
        f"{type(model).__name__} has no layer to adapt: found {contents}. By default adapters target Linear, Conv1D, "
        "Conv1d/2d/3d and quantised linears inside the model; wrap a single layer in a module, or name an "
        f"embedding or a head in target_modules{left_out}"
    )


# -- names -------------------------------------------------------------------------------------------------------


def _linear_info(layers: list[AdaptableLayer], roles: Roles, tied_layers: set[str]) -> LinearInfo:
    shapes = Counter((layer.in_features, layer.out_features) for layer in layers).most_common()
    role = roles[layers[0].path]
    fits = all(_is_plain_linear(layer) and layer.in_features % 64 == 0 for layer in layers)
    return LinearInfo(
        role=role,
        in_features=shapes[0][0][0],
        out_features=shapes[0][0][1],
        count=len(layers),
        shapes=tuple((size[0], size[1], count) for size, count in shapes),
        patterns=tuple(dict.fromkeys(pattern_of(layer.path) for layer in layers)),
        quantizable=fits and role != "head" and not any(layer.path in tied_layers for layer in layers),
    )


def _is_plain_linear(layer: AdaptableLayer) -> bool:
    # transformers replaces exactly these classes by bitsandbytes' linears; another subclass may have another forward
    return layer.kind == "linear" and (
        type(layer.module) is nn.Linear
        or isinstance(layer.module, Conv1D | GgufLinear)
        or type(layer.module).__module__.startswith("bitsandbytes")
    )


def _norm_info(paths: list[str], tree: ModuleTree) -> NormInfo:
    return NormInfo(tree.norms[paths[0]], len(paths), tuple(dict.fromkeys(pattern_of(path) for path in paths)))


# -- figures -----------------------------------------------------------------------------------------------------


def _parameter_sizes(model: nn.Module, tree: ModuleTree) -> Counter[str]:
    """Return {dtype: number of weights}; tied weights count once, packed 4-bit weights by their unpacked size."""
    sizes: Counter[str] = Counter()
    for path, name, parameter in unique_parameters(model):
        layer = tree.layers.get(path)
        dense = (
            layer.in_features * layer.out_features if layer and layer.kind == "linear" and name == "weight" else None
        )
        sizes[str(parameter.dtype).removeprefix("torch.")] += dense or parameter.numel()
    return sizes


def _unreached(model: nn.Module, tree: ModuleTree) -> dict[str, int]:
    """Return {class: number of weights} of matrices that no adapter can target, expert stacks excepted."""
    stacks = {id(stack) for module in tree.modules.values() for stack in expert_stacks(module).values()}
    sizes: Counter[str] = Counter()
    for path, _, parameter in unique_parameters(model):
        if path in tree.modules and path not in tree.layers and parameter.ndim >= 2 and id(parameter) not in stacks:
            sizes[type(tree.modules[path]).__name__] += parameter.numel()
    return dict(sizes)
