"""Several adapters as one, evaluated live: `algebra.py` what can be composed, `route.py` which rows get what,
`stacked.py` many low-rank adapters in two products, `evaluation.py` everything else."""

from peftcore.composition.algebra import BASE, Average, Composition, Gate, Only, Parallel, Split, Stack, Weighted

__all__ = ["BASE", "Average", "Composition", "Gate", "Only", "Parallel", "Split", "Stack", "Weighted"]
