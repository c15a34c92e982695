"""Several adapters as one, evaluated live, without making a new adapter.

`algebra.py` defines the compositions, `route.py` which row of a batch uses which, `stacked.py` computes many low-rank
adapters in two products. The general path is `peftcore.layers.composed`.
"""

from peftcore.composition.algebra import BASE, Average, Composition, Gate, Only, Parallel, Split, Stack, Weighted

__all__ = ["BASE", "Average", "Composition", "Gate", "Only", "Parallel", "Split", "Stack", "Weighted"]
