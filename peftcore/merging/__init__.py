"""Several adapters made into one, in weight space: a plain LoRA that is there afterwards, and can be saved.

`recipe.py` says what is done to the changes ΔW, `mixing.py` and `sparsify.py` do it to dense tensors, `scalars.py` with
one number for each layer, `factors.py` without ever forming ΔW; `changes.py` reads adapters of any method, `layer.py`
combines one layer, `sources.py` checks what is to be combined, `companions.py` what it brings besides, `placing.py`
puts the result into the model. `merging.py` is ours, `weighted.py` HF PEFT's.
"""

from peftcore.merging.merging import MergeReport, add_merged
from peftcore.merging.recipe import Recipe
from peftcore.merging.weighted import add_weighted_adapter

__all__ = ["MergeReport", "Recipe", "add_merged", "add_weighted_adapter"]
