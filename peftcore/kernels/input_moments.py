"""Second moments R = E[x xᵀ] of the inputs of layers, collected while a model runs on calibration data.

Shapes: n tokens, i in_features.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftcore.errors import ConfigError


class InputMoments:
    """Sums of x xᵀ over the tokens of all batches, by path of the layer. Padding is left out.

    A layer takes 4·i² bytes.
    """

    needs_loss: ClassVar[bool] = False

    def __init__(self, title: str):
        self.title = title
        """Label of the progress bar."""
        self.batches = 0
        """Batches so far (count)."""
        self.tokens: dict[str, int] = {}
        """{path: tokens that the layer has seen (count)}"""
        self._sums: dict[str, Tensor] = {}
        self._mask: Tensor | None = None
        self._latest: tuple[Tensor, Tensor, int] | None = None

    def begin(self, batch: Mapping[str, Any]) -> None:
        """Prepare for a batch (keyword arguments of the model) that runs next."""
        mask = batch.get("attention_mask")
        self._mask = mask.bool() if isinstance(mask, Tensor) else None
        self._latest = None
        self.batches += 1

    def hook(self, path: str) -> Callable[..., None]:
        """Return a forward hook for the layer at `path`."""

        def forward_hook(_layer: Any, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            self.add(path, inputs[0])

        return forward_hook

    def is_done(self) -> bool:
        """Return False: every further batch adds to the sums."""
        return False

    @torch.no_grad()
    def add(self, path: str, x: Tensor) -> None:
        """Add the inputs x (..., i) of one call of a layer.

        Raises:
            ConfigError: x has values that are not finite.
        """
        if self._latest is None or self._latest[0] is not x:  # query, key and value have one input
            has_mask = self._mask is not None and self._mask.shape == x.shape[:-1]
            rows = (x[self._mask] if has_mask else x.reshape(-1, x.shape[-1])).float()
            self._latest = x, rows.T @ rows, len(rows)
            if not self._latest[1].diagonal().isfinite().all():
                raise ConfigError(
                    f"calibration: the input of {path} has values in batch {self.batches} that are NaN, infinite or "
                    "too large to square; leave that batch out, or look for what makes the base overflow"
                )
        _, products, count = self._latest
        if path in self._sums:
            self._sums[path] += products
        else:
            self._sums[path] = products.clone()
        self.tokens[path] = self.tokens.get(path, 0) + count

    def pop(self, path: str) -> Tensor:
        """Return R (i, i) of a layer in float32, and forget it."""
        return self._sums.pop(path).div_(max(self.tokens[path], 1))


def cholesky_root(moment: Tensor, damping: float) -> Tensor:
    """Return a lower triangular C (i, i) in float64 with C Cᵀ = R + damping · (mean of R's diagonal) · I.

    Args:
        moment: R (i, i), symmetric and, up to rounding, positive semidefinite.
        damping: Share of the mean of the diagonal, above 0; raised tenfold until the sum is positive definite.
    """
    moment = moment.double()
    mean = moment.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    while True:
        damped = moment.clone()
        damped.diagonal().add_(damping * mean)
        root, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return root
        damping *= 10
