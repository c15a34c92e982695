"""Parameters of the base model: each parameter once, tied parameters, and stacked expert weights."""

from collections.abc import Iterator

from torch import nn

from peftcore.detection.module_tree import walk


def _named_parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield (module path, name, parameter); a tied parameter is yielded once for each of its names."""
    for path, module in walk(model):
        for name, parameter in module.named_parameters(recurse=False):
            yield path, name, parameter


def unique_parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield (module path, name, parameter) of the base model; a tied parameter is yielded under its first name only."""
    seen: set[int] = set()
    for path, name, parameter in _named_parameters(model):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield path, name, parameter


def tied_parameters(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Return groups of base-model parameter names that share one parameter (tied weights)."""
    names: dict[int, list[str]] = {}
    for path, name, parameter in _named_parameters(model):
        names.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)


def expert_stacks(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the stacked expert weights of a module.

    These are two or more parameters (experts, ·, ·) of the module itself, or of children with one such parameter each.

    Returns:
        {path relative to the module: parameter}, such as `gate_up_proj` or JetMoE's `input_linear.weight`; {} if the
        module has no experts.
    """
    if any(isinstance(child, nn.Conv1d) for child in module.children()):
        return {}  # a mixer: the first axis counts heads, not experts
    direct = {name: p for name, p in module.named_parameters(recurse=False) if _is_stack(p)}
    in_children = {
        f"{name}.{parameter}": stack
        for name, child in module.named_children()
        if not type(child).__module__.startswith("torch.") and not any(True for _ in child.children())
        for parameter, stack in child.named_parameters()
        if _is_stack(stack)
    }
    for stacks in (direct, in_children):
        if len(stacks) > 1 and len({p.shape[0] for p in stacks.values()}) == 1:
            return stacks
    return {}


def _is_stack(parameter: nn.Parameter) -> bool:
    return parameter.ndim == 3 and min(parameter.shape) > 1


def expert_count(module: nn.Module) -> int:
    """Return the number of experts in a module, as stacked weights or as a list of MLPs; 0 for any other module."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        experts = list(module.children())
        same = len({type(expert) for expert in experts}) == 1
        return len(experts) if same and any(True for _ in experts[0].children()) else 0
    return next((stack.shape[0] for stack in expert_stacks(module).values()), 0)
