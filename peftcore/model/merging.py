"""Merging of adapters into the base weights, and into a new adapter."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from peftcore import merging
from peftcore.composition.algebra import Composition, weights_of
from peftcore.injection import merge
from peftcore.merging import LowRankReport, Recipe
from peftcore.model.adapted_module import AdaptedModule


class MergingMethods(AdaptedModule):
    """Methods of `PeftModel` that merge adapters, and leave the model's class as it is."""

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights, in place; `unmerge_adapter` restores them bit for bit.

        Args:
            adapter_names: the adapters, in order; None for the active ones.
            safe_merge: check each merged weight for NaN and Inf before any weight is written.

        Raises:
            MergeError: an adapter cannot be merged, a merged weight is not finite, adapters are disabled, or a route is
                open. Nothing is changed then.
            AdapterNameError: a name is not loaded.
        """
        merge.merge_adapter(self._module, adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Restore the unmerged base weights, bit for bit."""
        merge.unmerge_adapter(self._module)

    @contextlib.contextmanager
    def merged(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> Iterator[None]:
        """Merge adapters for the time of a `with` block, so that forward passes cost what the base alone costs.

        It pays for `generate` with a base in 16 or 32 bits: merging and unmerging SmolLM2-135M takes 0.1 s. One copy of
        each merged weight is held meanwhile. On a quantised base the merged weights are quantised again, which changes
        the outputs; stay unmerged there. All threads see the merged weights.

        Args:
            adapter_names: the adapters, in order; None for the active ones.
            safe_merge: check each merged weight for NaN and Inf before any weight is written.

        Yields:
            Nothing. After the block, also after an error, the unmerged weights are back bit for bit.

        Raises:
            MergeError: adapters are merged already; or see `merge_adapter`.
            AdapterNameError: a name is not loaded.
        """
        with merge.merged(self._module, adapter_names, safe_merge):
            yield

    def add_merged(
        self, adapter_name: str, weights: Mapping[str, float] | Composition, recipe: Recipe, rank: int | None = None
    ) -> LowRankReport:
        """Add a LoRA that is a weighted combination of other adapters; see `peftcore.merging.add_merged`.

        For example `add_merged("m", {"a": 0.7, "b": 0.3}, Recipe.ties(density=0.3), rank=16)`.

        Args:
            adapter_name: name of the new adapter.
            weights: {adapter: weight}, or a sum such as `0.7 * Only("a") + 0.3 * Only("b")`.
            recipe: the merging method.
            rank: the largest rank of a layer (count); None for no loss, or for the adapters' largest rank at the layer
                if the recipe needs dense weights.

        Returns:
            The rank and the relative error of each layer.

        Raises:
            MergeError: the adapters cannot be merged by this recipe.
            AdapterNameError: a name is not loaded, or the new name is taken.
        """
        by_name = weights_of(weights) if isinstance(weights, Composition) else weights
        return merging.add_merged(self._module, adapter_name, by_name, recipe, rank)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> LowRankReport:
        """Do `add_merged` with PEFT's arguments and meaning; see `peftcore.merging.add_weighted_adapter`."""
        svd = (svd_rank, svd_clamp, svd_full_matrices, svd_driver)
        return merging.add_weighted_adapter(
            self._module, adapters, weights, adapter_name, combination_type, *svd, density, majority_sign_method
        )
