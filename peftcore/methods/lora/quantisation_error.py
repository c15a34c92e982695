"""Starts that correct the quantisation error of the base where the layer's inputs make it count.

E = W − Q is the error of the base, and R the second moment of the layer's inputs, the mean of x xᵀ. The start L = s·BA
of rank r minimises the mean squared error of the layer's output,

    mean ‖(E − L) x‖² = ‖(E − L) C‖²    for any C with C Cᵀ = R,

so L C is the truncated SVD U Σ Vᵀ of E C, and L = U Σ Vᵀ C⁻¹ = U Uᵀ E. The last form needs no inverse of C: L projects
the error on the r output directions in which it is largest. It is the same L for every root C of R.

Shapes: i in_features, o out_features, r rank; W, Q, E, L (o, i), R, C (i, i), U (o, r).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from peftcore.errors import ConfigError
from peftcore.kernels.input_moments import InputMoments, cholesky_root
from peftcore.methods.lora.initialisation import Factors, Initialisation, draw_defaults, truncated_svd
from peftcore.methods.lora.observer import Observer

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora
    from peftcore.methods.lora.config import LoraConfig


MOMENT_BYTES = 2 << 30
"""Largest memory of second moments at a time; a larger model takes several passes over the data."""


def error_directions(error: Tensor, moment: Tensor, r: int, damping: float) -> tuple[Tensor, Tensor]:
    """Return the output directions in which a layer's error is largest for its inputs.

    Args:
        error: E (o, i).
        moment: R (i, i).
        r: Rank.
        damping: Share of the mean of R's diagonal that is added to the diagonal.

    Returns:
        U (o, r), and the root mean square Σ (r,) of the error along each direction, in E's dtype.
    """
    seen = (error.double() @ cholesky_root(moment, damping)).to(error.dtype)
    u, values, _ = truncated_svd(seen, r)
    return u, values


class QuantisationError(Observer):
    """Second moments of the inputs of all layers, for the start that corrects the quantisation error."""

    needs_original = True
    damping: ClassVar[float]
    """Share of the mean of R's diagonal that is added to the diagonal."""

    def __init__(self, config: "LoraConfig", layers: "Mapping[str, Lora]"):
        super().__init__(config, layers)
        self.quantised = {path: adapter for path, adapter in layers.items() if adapter.base.quantized}
        """The layers that have lost something; others, such as an output head, keep plain LoRA's start."""
        if not self.quantised:
            raise ConfigError(
                f"init_lora_weights={config.init_lora_weights!r} corrects what quantising lost, and the base is not "
                f"quantised at {next(iter(layers))}; load the base in 4 or 8 bits, or use init_lora_weights=True"
            )
        self.moments = InputMoments(self.title)
        self._made: dict[str, Factors] = {}

    def groups(self) -> list[list[str]]:
        """Return groups of layers whose second moments fit into MOMENT_BYTES, in the order of the layers."""
        groups: list[list[str]] = [[]]
        room = MOMENT_BYTES
        for path, adapter in self.quantised.items():
            size = 4 * adapter.base.in_features**2
            if groups[-1] and size > room:
                groups.append([])
                room = MOMENT_BYTES
            groups[-1].append(path)
            room -= size
        return groups

    @torch.no_grad()
    def finish(self, paths: Sequence[str]) -> None:
        for path in paths:
            if self.moments.tokens.get(path, 0) >= self.layers[path].r:  # fewer are an error of `check`
                self._made[path] = self._factors(path, self.layers[path])

    def begin(self, batch: Mapping[str, Any]) -> None:
        self.moments.begin(batch)

    def observe(self, path: str, x: Tensor, y: Tensor) -> None:
        self.moments.add(path, x)

    def check(self) -> None:
        for path, adapter in self.quantised.items():
            if (tokens := self.moments.tokens.get(path, 0)) < adapter.r:
                raise ConfigError(
                    f"init_lora_weights={self.config.init_lora_weights!r}: the calibration rows give {path} {tokens} "
                    f"inputs, and its rank {adapter.r} needs at least as many; give more rows (a few hundred), a "
                    "smaller r, or exclude the layer"
                )

    def factors(self, path: str, adapter: "Lora") -> Factors:
        if path not in self.quantised:
            return adapter.lora_A_weight.detach(), torch.zeros_like(adapter.lora_B_weight)
        return self._made.pop(path)

    def _factors(self, path: str, adapter: "Lora") -> Factors:
        weight = self.original(path).to(adapter.base.device).float()
        error = weight - adapter.base.read_unmerged().float()
        moment = self.moments.pop(path)
        rank = min(adapter.r, *error.shape)  # further components keep plain LoRA's start
        u, values = error_directions(error, moment, rank, self.damping)
        a, b = self.split(adapter, u, values, u.T @ error, moment)
        further = adapter.r - rank
        return torch.cat([a, adapter.lora_A_weight.detach()[rank:].to(a)]), nn.functional.pad(b, (0, further))

    def split(self, adapter: "Lora", u: Tensor, values: Tensor, projected: Tensor, moment: Tensor) -> Factors:
        """Return A (k, i) and B (o, k) with s·BA = U·projected; k is r, or the layer's smaller side.

        Args:
            adapter: The adapter of the layer; A still has its random start.
            u: U (o, k).
            values: Σ (k,).
            projected: Uᵀ E (k, i).
            moment: R (i, i).
        """
        raise NotImplementedError(f"{type(self).__name__} must define split")


class QuantisationErrorStart(Initialisation):
    """Initialisation at the quantisation error of the base; plain LoRA until the data are there, and on disk."""

    is_plain_on_disk = True

    def initialise(self, lora: "Lora") -> None:
        draw_defaults(lora)
        nn.init.zeros_(lora.lora_B_weight)
