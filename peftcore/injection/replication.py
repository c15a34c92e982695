"""`layer_replication`: a deeper model from ranges of its own blocks. Depth up-scaling: arXiv:2312.15166.

The ranges [(0, 4), (2, 5)] give the blocks 0 1 2 3 2 3 4. Replicated blocks share base weights, and each has its own
adapters.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftcore.errors import OptionRangeError, TargetError
from peftcore.injection.module_index import ModuleIndex


@dataclass
class Replication:
    """The state from before a replication, to restore when the adapter that asked for it is deleted."""

    parent: nn.Module
    name: str
    blocks: nn.ModuleList
    config: Any
    """The model's configuration; None if it has no `num_hidden_layers`."""
    depth: int
    """Blocks before the replication (count)."""
    by_block: dict[str, Any]
    """{option of the configuration: its list with one entry for each block}, such as `layer_types`."""

    def undo(self) -> None:
        """Restore the original blocks."""
        self.parent._modules[self.name] = self.blocks
        _describe_blocks(self.config, self.depth, self.by_block)

    def separate(self) -> None:
        """Give each repeated block its own copies of shared tensors, so that the model can be saved and trained."""
        earlier: set[int] = set()
        for block in self.parent._modules[self.name].children():  # type: ignore[union-attr]
            copies: dict[int, Any] = {}  # tensors that one block shares inside of itself stay shared
            tensors = [*block.parameters(), *block.buffers()]
            stores: list[dict[str, Any]] = [
                store for module in block.modules() for store in (module._parameters, module._buffers)
            ]
            for store in stores:
                for name, tensor in store.items():
                    if id(tensor) in earlier:
                        store[name] = copy.deepcopy(tensor, copies)
            earlier.update(map(id, tensors))


def replicate(model: nn.Module, ranges: Sequence[tuple[int, int]]) -> Replication:
    """Replace the model's blocks, in place, by the blocks of all ranges; repeated blocks share their base weights.

    Args:
        model: a plain model with one list of blocks.
        ranges: (first block, last block + 1) of each range, in order.

    Returns:
        The state to undo the change.

    Raises:
        OptionRangeError: a range is empty or outside of the model; nothing is changed.
        TargetError: the model does not have exactly one list of blocks; nothing is changed.
    """
    path, blocks = _block_list(model)
    for start, end in ranges:
        if not 0 <= start < end <= len(blocks):
            raise OptionRangeError(
                f"layer_replication: ({start}, {end}) is not a range of the model's {len(blocks)} blocks; give pairs "
                f"(start, end) with 0 <= start < end <= {len(blocks)}"
            )
    parent_path, _, name = path.rpartition(".")
    config = getattr(model, "config", None)
    config = config if hasattr(config, "num_hidden_layers") else None
    by_block = _options_by_block(config, len(blocks))
    before = Replication(model.get_submodule(parent_path), name, blocks, config, len(blocks), by_block)
    numbers = [n for start, end in ranges for n in range(start, end)]
    before.parent._modules[name] = nn.ModuleList(_twin(blocks[n], index) for index, n in enumerate(numbers))
    deeper = {option: type(values)(values[n] for n in numbers) for option, values in by_block.items()}
    _describe_blocks(config, len(numbers), deeper)
    return before


def _options_by_block(config: Any, depth: int) -> dict[str, Any]:
    """Return the options of a configuration that are lists with one entry for each block."""
    options = {} if config is None else vars(config)
    lists = {key: value for key, value in options.items() if type(value) in (list, tuple) and len(value) == depth}
    others = ("architectures", "bos_token_id", "eos_token_id", "pad_token_id")  # of this length by chance
    return {key: value for key, value in lists.items() if key not in others}


def _describe_blocks(config: Any, depth: int, by_block: dict[str, Any]) -> None:
    """Set the number of blocks in a configuration, and its options with one entry for each block."""
    if config is not None:
        config.num_hidden_layers = depth
        for option, values in by_block.items():
            setattr(config, option, values)


def _block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    lists = [(p, m) for p, m in ModuleIndex(model).modules.items() if isinstance(m, nn.ModuleList) and len(m)]
    fitting = [(p, m) for p, m in lists if depth is None or len(m) == depth]
    outermost = [(p, m) for p, m in fitting if not any(p.startswith(f"{other}.") for other, _ in fitting)]
    if len(outermost) != 1:
        raise TargetError(
            f"layer_replication needs a model with one stack of blocks; {type(model).__name__} has {len(outermost)}; "
            "leave the option out"
        )
    return outermost[0]


def _twin(block: nn.Module, layer_idx: int) -> nn.Module:
    """Copy a block's modules, with shared parameters and buffers and its own index in the key-value cache."""
    tensors = [*block.parameters(), *block.buffers()]
    twin = copy.deepcopy(block, {id(tensor): tensor for tensor in tensors})
    for module in twin.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = layer_idx  # type: ignore[assignment]
    return twin
