"""The blocks of a model that a configuration names, for methods that adapt whole blocks."""

from collections.abc import Sequence
from typing import Any

from peftcore._util.patterns import is_suffix, matched
from peftcore.config import TunerConfig
from peftcore.errors import TargetError


def chosen_blocks(config: TunerConfig, paths: Sequence[str]) -> list[int]:
    """Return the numbers of the blocks that the configuration's targets, exclusions and layers select.

    Args:
        config: The configuration; all blocks are selected if it has no `target_modules`.
        paths: Paths of the model's blocks, in order.

    Raises:
        TargetError: No block is selected.
    """
    chosen = config.layers_to_transform
    numbers = range(len(paths)) if chosen is None else [chosen] if isinstance(chosen, int) else chosen
    found = [
        number
        for number, path in enumerate(paths)
        if number in numbers
        and (config.target_modules is None or _is_named(path, config.target_modules))
        and not (config.exclude_modules and _is_named(path, config.exclude_modules))
        and (config.layers_pattern is None or path.split(".")[-2] in config.layers_pattern)
    ]
    if not found:
        raise TargetError(
            f"{config.method} adapts whole blocks, and the options name none of {paths[0]} to {paths[-1]}; leave "
            "out target_modules for all of them"
        )
    return found


def _is_named(path: str, names: Any) -> bool:
    return matched(names, path) is not None if isinstance(names, str) else any(is_suffix(name, path) for name in names)
