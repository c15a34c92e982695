"""WaveFT: ΔW = α · IDWT₂(C), where n wavelet coefficients of one level train and the others are zero. arXiv:2505.12532.

The trained coefficients lie at random places, the same for all layers of one shape. Daubechies wavelets and symlets
are computed from their definition. PEFT 0.21.2 names db11 to db38, sym11 to sym20 and coif5 to coif17 too but cannot
compute them.

Shapes: i in_features, o out_features, n coefficients, f length of the filter; waveft_spectrum (n,), C (o', i') with
o' and i' even and at least o + f − 2 and i + f − 2, ΔW (o, i). A convolution's kernel counts with the inputs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.adapter import Adapter, Shared
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig, first_match
from peftcore.errors import ConfigError
from peftcore.kernels.maths import random_places, weight_shape, widened
from peftcore.kernels.start_values import normal_
from peftcore.registry import register

_SYMLETS = {2: 0, 3: 0, 4: 1, 5: 2, 6: 5, 7: 4, 8: 5, 9: 6, 10: 21}
"""{vanishing moments: zeros of the most symmetric Daubechies filter outside the unit circle, as bits}."""
# fmt: off
_COIFLETS = {  # divided by √2 as in Daubechies' "Ten lectures on wavelets", table 8.1
    1: (-0.051429728471, 0.238929728471, 0.602859456942, 0.272140543058, -0.051429728471, -0.011070271529),
    2: (0.011587596739, -0.029320137980, -0.047639590310, 0.273021046535, 0.574682393857, 0.294867193696,
        -0.054085607092, -0.042026480461, 0.016744410163, 0.003967883613, -0.001289203356, -0.000509505399),
    3: (-0.002682418671, 0.005503126709, 0.016583560479, -0.046507764479, -0.043220763560, 0.286503335274,
        0.561285256870, 0.302983571773, -0.050770140755, -0.058196250762, 0.024434094321, 0.011229240962,
        -0.006369601011, -0.001820458916, 0.000790205101, 0.000329665174, -0.000050192775, -0.000024465734),
    # PEFT's table, which is no coiflet (its sum is 1.024), so that its directories read
    4: (0.000630961211, -0.001152225144, -0.005194525163, 0.0113609309, 0.018945061046, -0.051719843706,
        -0.034486140471, 0.302272510537, 0.554547906241, 0.307917668025, -0.043525009281, -0.064887950971,
        0.019880773648, 0.017638947871, -0.007366054847, -0.002312432308, 0.001426006344, 0.000466698464,
        -0.000127000784, -0.000113053637, 0.000030483649, 0.000012667448, -0.000001584927, -0.000001123948),
}
# fmt: on
FAMILIES = [*(f"db{n}" for n in range(1, 21)), *(f"sym{n}" for n in _SYMLETS), *(f"coif{n}" for n in _COIFLETS)]


@cache
def scaling_filter(family: str) -> tuple[float, ...]:
    """Return the low-pass reconstruction filter of a wavelet family; its values sum to √2."""
    name, order = family.rstrip("0123456789"), int(family.lstrip("abcdefghijklmnopqrstuvwxyz"))
    if name == "coif":
        return tuple(math.sqrt(2) * value for value in _COIFLETS[order])
    return _daubechies(order, _SYMLETS[order] if name == "sym" else 0)


def _daubechies(moments: int, outside: int) -> tuple[float, ...]:
    """Return the filter with N = `moments` zeros at −1 and the zeros of Σ_k C(N−1+k, k) yᵏ, y = (2 − z − 1/z)/4.

    outside: a bit for each root y (largest first, a conjugate pair counts once) whose zero z is to lie outside the unit
    circle; 0 gives Daubechies' own extremal phase.
    """
    coefficients = torch.tensor(
        [math.comb(moments - 1 + k, k) for k in range(moments)], dtype=torch.float64, device="cpu"
    )
    companion = coefficients.new_zeros(moments - 1, moments - 1)
    companion.diagonal(-1).fill_(1)
    companion[:, -1:] = -(coefficients[:-1] / coefficients[-1])[:, None]
    roots = sorted((y for y in torch.linalg.eigvals(companion).tolist() if y.imag > -1e-12), key=abs, reverse=True)
    zeros: list[complex] = []
    for bit, y in enumerate(roots):
        z = 1 - 2 * y + 2 * (y * y - y) ** 0.5
        if (abs(z) > 1) != bool(outside >> bit & 1):
            z = 1 / z
        zeros += [z, z.conjugate()] if y.imag > 1e-12 else [z]
    taps: list[complex] = [1.0]
    for z in [*zeros, *[-1.0] * moments]:
        taps = [a - z * b for a, b in zip([*taps, 0.0], [0.0, *taps], strict=True)]
    total = sum(taps).real
    return tuple(math.sqrt(2) * tap.real / total for tap in taps)


@dataclass
class WaveFTConfig(TunerConfig):
    """WaveFT's options under PEFT's names."""

    size_fields: ClassVar[tuple[str, ...]] = ("n_frequency", "n_frequency_pattern")

    n_frequency: int = 2592
    """Trained coefficients of each layer (count)."""
    scaling: float = 25.0
    """α."""
    wavelet_family: str = "db1"
    """"db1" (Haar) to "db20", "sym2" to "sym10" or "coif1" to "coif4"; longer filters take longer."""
    use_idwt: bool = True
    """False: the trained numbers are entries of ΔW / α itself."""
    random_loc_seed: int = 777
    """Seed of the places of the trained coefficients."""
    n_frequency_pattern: dict[str, int] | None = field(default_factory=dict)
    """{path suffix or regular expression: n_frequency}; the first that matches a layer's path applies."""
    proportional_parameters: bool = False
    """Distribute layers · n_frequency coefficients by the layers' sizes; n_frequency_pattern is then not used."""
    bias: str = "none"
    """Biases of the model that train too: "none", "all" or "waveft_only"."""
    init_weights: bool = True
    """True: the adapter starts at zero; False: normal with deviation 0.01."""
    fan_in_fan_out: bool = False
    """Read and saved for PEFT; without effect, because the orientation is found per layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("n_frequency")
        self.one_of("bias", self.bias, ("none", "all", "waveft_only"))
        self.one_of("wavelet_family", self.wavelet_family, FAMILIES)
        if not isinstance(self.random_loc_seed, int):
            raise ConfigError(f"WaveFTConfig: random_loc_seed must be an integer; got {self.random_loc_seed!r}")


class Budget(Shared):
    """Coefficients of each layer, out of one budget for all layers."""

    def __init__(self, counts: Mapping[str, int]):
        super().__init__()
        self.counts = counts


@register("WAVEFT", WaveFTConfig)
class WaveFT(Adapter):
    """WaveFT at one layer."""

    layer_kinds = frozenset({"linear", "conv", "embedding"})
    shared: Budget | None
    places: Tensor
    filters: Tensor

    def __init__(self, config: WaveFTConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        self.config, self.path = config, path
        self.shape = weight_shape(base)
        self.waveft_spectrum = nn.Parameter(torch.empty(0))
        self.make_constants()
        if not config.proportional_parameters:
            self._take(first_match(config.n_frequency_pattern, path, config.n_frequency))

    def make_constants(self) -> None:
        low = scaling_filter(self.config.wavelet_family)
        high = [tap * (-1) ** k for k, tap in enumerate(reversed(low))]
        wide, device = torch.promote_types(self.base.dtype, torch.float32), self.waveft_spectrum.device
        self.register_buffer("filters", torch.tensor([low, high], dtype=wide, device=device)[:, None], persistent=False)
        if count := len(self.waveft_spectrum):
            self.register_buffer("places", self._chosen(count).to(device), persistent=False)

    @classmethod
    def make_shared(cls, config: WaveFTConfig, bases: Mapping[str, BaseWeight]) -> Budget | None:
        if not config.proportional_parameters:
            return None
        sizes = {path: math.prod(weight_shape(base)) for path, base in bases.items()}
        budget, total = config.n_frequency * len(sizes), sum(sizes.values())
        return Budget({path: max(1, round(size / total * budget)) for path, size in sizes.items()})

    def _take(self, count: int) -> None:
        """Create `count` coefficients and choose their places."""
        size = math.prod(self.shape)
        if not 1 <= count <= size:
            raise ConfigError(f"WAVEFT: n_frequency at {self.path} must be between 1 and {size} weights; got {count}")
        self.waveft_spectrum = nn.Parameter(self.waveft_spectrum.new_empty(count))
        self.make_constants()

    def _chosen(self, count: int) -> Tensor:
        """Return the places (count,) of the coefficients, on the CPU."""
        rows, size = self.shape[0], math.prod(self.shape)
        columns = size // rows
        places = random_places(size, count, self.config.random_loc_seed)
        if self.config.use_idwt:
            (_, half_rows, row_margin), (_, half_columns, column_margin) = self._grid(rows), self._grid(columns)
            row, column = places // columns + row_margin, places % columns + column_margin
            # PEFT filters the rows of the top right quarter high and those of the bottom left one low: swap them, so
            # that rows below the middle are high in the rows' direction
            swapped_row = row % half_rows + half_rows * (column >= half_columns)
            swapped_column = column % half_columns + half_columns * (row >= half_rows)
            places = swapped_row * 2 * half_columns + swapped_column
        return places

    def _grid(self, size: int) -> tuple[int, int, int]:
        """Return (coefficients, half of them, those before the first trained one) along an axis of ΔW of this size."""
        wide = size + self.filters.shape[-1] - 2
        wide += wide % 2
        return wide, wide // 2, (wide - size) // 2

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.shared is not None:
            self._take(self.shared.counts[self.path])
        if self.config.init_weights:
            nn.init.zeros_(self.waveft_spectrum)
        else:
            self.waveft_spectrum.copy_(0.01 * normal_(torch.empty(len(self.waveft_spectrum), device="cpu")))

    def delta_weight(self) -> Tensor:
        rows, columns = self.shape[0], math.prod(self.shape[1:])
        trained = self.config.scaling * widened(self.waveft_spectrum)
        if not self.config.use_idwt:
            return trained.new_zeros(rows * columns).scatter(0, self.places, trained).view(self.shape)
        high, wide = self._grid(rows)[0], self._grid(columns)[0]
        grid = trained.new_zeros(high * wide).scatter(0, self.places, trained).view(high, wide)
        with torch.autocast(trained.device.type, enabled=False):
            by_column = self._synthesis(grid, columns).T
            return self._synthesis(by_column, rows).T.reshape(self.shape)

    def _synthesis(self, bands: Tensor, size: int) -> Tensor:
        """Return (k, size) for k rows of low-pass coefficients followed by as many high-pass ones."""
        bands = bands.unflatten(-1, (2, -1))
        signal = F.conv_transpose1d(bands, self.filters.to(bands), stride=2, padding=self.filters.shape[-1] - 2)
        return signal[:, 0, :size]
