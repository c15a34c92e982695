"""Adapter merging: several adapters become one new LoRA of the same model, which can be saved like any other.

| module | job |
|---|---|
| `merge` | `add_merged`: merging by a `Recipe` |
| `weighted` | `add_weighted_adapter`: merging by HF PEFT's names and semantics |
| `ia3_vectors` | the weighted sum of IA3 adapters, which is an IA3 |
| `recipe` | `Recipe`: how weight changes ΔW become one |
| `sources` | the adapters to merge, checked before anything is computed |
| `weight_changes` | one adapter's ΔW at one layer, as factors or dense |
| `layer` | the merge of one layer |
| `coefficients` | recipes with one number for each change: sums, averages, SLERP, model stock |
| `elementwise`, `sparsify` | recipes that look at single elements of ΔW: TIES, DARE, DELLA, breadcrumbs |
| `extra_modules` | modules and token rows that are copied and not merged |
| `insertion` | the new LoRA's configuration and parameters |
"""

import warnings
from typing import Any

from peftcore.kernels.factors import LowRankReport
from peftcore.merging.merge import add_merged
from peftcore.merging.recipe import Recipe
from peftcore.merging.weighted import add_weighted_adapter

__all__ = ["LowRankReport", "Recipe", "add_merged", "add_weighted_adapter"]


def __getattr__(name: str) -> Any:
    if name != "MergeReport":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn("peftcore.merging.MergeReport is now called LowRankReport", DeprecationWarning, stacklevel=2)
    return LowRankReport
