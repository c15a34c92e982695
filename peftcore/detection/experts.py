"""Experts whose weights are raw parameters, one stack for all experts of a block (Mixtral, Qwen-MoE, GPT-OSS, JetMoE).

Roles follow from shapes: the parameter with inner size 2m is a fused gate-up, those with m are gate, up and down.
Shapes: e experts, d width of the block, m inner size of one expert. A stack is (e, out, in); it is (e, in, out) if the
module has a true attribute `is_transposed`.
"""

from dataclasses import replace

from torch import Tensor, nn

from peftcore.detection.architecture import ExpertInfo
from peftcore.detection.module_tree import ModuleTree
from peftcore.detection.parameters import expert_stacks
from peftcore.detection.roles import Role


def find_experts(tree: ModuleTree) -> dict[str, ExpertInfo]:
    """Return {name such as `experts.down_proj`: description}, with one entry for the same parameter of all blocks."""
    infos_by_name: dict[str, list[ExpertInfo]] = {}
    for path, module in tree.modules.items():
        block = tree.block_of(path)
        stacks = expert_stacks(module)
        if block is None or not stacks:
            continue
        attends = any("attention" in part.lower() or "attn" in part.lower() for part in path.split("."))
        for name, info in _expert_infos(module, stacks, tree.width(block), attends).items():
            infos_by_name.setdefault(f"{path.rpartition('.')[2]}.{name}", []).append(info)
    return {name: replace(infos[0], count=len(infos)) for name, infos in infos_by_name.items()}


def _expert_infos(
    module: nn.Module, stacks: dict[str, nn.Parameter], width: int, attends: bool
) -> dict[str, ExpertInfo]:
    inner = {name: _inner_size(p, width) for name, p in stacks.items()}
    if None in inner.values():
        return {}
    smallest = min(size for size in inner.values() if size is not None)
    single = [name for name, size in inner.items() if size == smallest]
    roles: dict[str, Role] = dict.fromkeys(stacks, "fused_gate_up")
    equal: tuple[Role, ...] = ("query", "output") if attends else ("gate", "up", "down")
    roles |= dict(zip(single, equal[-len(single) :], strict=False))
    return {name: _info(module, stacks[name], role, width) for name, role in roles.items()}


def _inner_size(stack: Tensor, width: int) -> int | None:
    """Return m or 2m; None if no axis of the stack has the block's width."""
    sides = list(stack.shape[1:])
    if width not in sides:
        return None
    sides.remove(width)
    return sides[0]


def _info(module: nn.Module, stack: Tensor, role: Role, width: int) -> ExpertInfo:
    experts, rows, columns = stack.shape
    transposed = getattr(module, "is_transposed", None)
    if transposed is None:
        transposed = (columns if role in ("down", "output") else rows) == width and rows != columns
    sizes = (rows, columns) if transposed else (columns, rows)
    return ExpertInfo(role, experts, sizes[0], sizes[1], bool(transposed), count=1)
