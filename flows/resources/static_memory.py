"""Memory of a run without running it: weights on the meta device, and a step on fake tensors."""

from typing import Any

from flows.params import Params
from flows.resources.activations import Activations, activations, evaluation_bytes
from flows.resources.batches import Workload
from flows.resources.sizes import Sizes, base_on_meta, number_of_blocks, sizes, with_blocks


class StaticMemory:
    """Memory of a run without running it. size: sizes that were counted already."""

    def __init__(self, config: Any, params: Params, work: Workload, size: Sizes | None = None) -> None:
        self.sizes = sizes(config, params, work.optimizer_steps) if size is None else size
        self.step: Activations = activations(config, params, work.largest, work.longest, work.optimizer_steps)
        self.evaluation = evaluation_bytes(config, params, work.largest_evaluation, work.longest)

    def memory(self) -> dict[str, int]:
        """Return the bytes of training at its peak, by kind."""
        size, step = self.sizes, self.step
        backward = max(step.loss, step.working + size.dequantized)
        return {
            "base weights, quantised": size.quantized,
            "base weights, plain": size.plain,
            "base file, mapped": size.mapped,
            "adapter": size.adapters,
            "gradients": size.gradients,
            "optimiser": size.optimizer,
            "activations": step.kept,
            "loss, or the backward's working memory": backward,
            "evaluation, beyond training": max(0, self.evaluation + size.dequantized - step.kept - backward),
        }

    @property
    def peak(self) -> int:
        """Peak of training (bytes), without libraries."""
        return sum(self.memory().values())

    @property
    def loading(self) -> int:
        """Peak of loading: weights, their file, and one weight in 16 and in 32 bits."""
        return self.sizes.quantized + self.sizes.plain + self.sizes.mapped + 3 * self.sizes.largest


def blocks_are_alike(config: Any, params: Params, whole: Sizes) -> bool:
    """Return True if every block after the first has as many weights as the second, so that two represent all."""
    one, two = (base_on_meta(with_blocks(config, blocks), params).num_parameters() for blocks in (1, 2))
    return abs(2 * (one + (number_of_blocks(config) - 1) * (two - one)) / whole.base_file - 1) < 0.01
