"""FRoD: W' = U (S + Λ) Vᵀ, with Λ and a sparse S trained, from W = U Λ₀ Vᵀ. doi.org/10.1609/aaai.v40i31.39813.

All layers of one role, such as every q_proj, share the basis V: the right factor of the generalised singular value
decomposition of their stacked weights. U has columns of length 1 and is frozen. Computed as W + U (S + Λ − Λ₀) Vᵀ,
which is W exactly at the start.

Shapes: i in_features, o out_features, n ≈ sparse_rate · i² entries of S off its diagonal; V = frod_V (i, i), places of
S frod_s_indices (2, n), size of S frod_s_size (2,); U (o, i), Λ = diag(frod_lambda_l) (i,), frod_lambda_s_values (n,).
"""

import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from peftcore.adapter import Adapter, Shared
from peftcore.bases import BaseWeight
from peftcore.config import RandomProjectionConfig
from peftcore.errors import ConfigError
from peftcore.registry import register


@dataclass
class FrodConfig(RandomProjectionConfig):
    """FRoD's options under PEFT's names."""

    not_saved_if_none: ClassVar[tuple[str, ...]] = ("exclude_modules",)

    projection_prng_key: int = 0
    """Seed of the places of S."""
    save_projection: bool = True
    """False omits V and the places of S from the directory; loading then computes them again from the base weights."""
    frod_dropout: float = 0.0
    """Probability of dropping an element of the adapter's input in training."""
    bias: str = "none"
    """Biases of the model that train too: "none", "all" or "frod_only"."""
    sparse_rate: float = 0.01
    """Share of the entries of S that train, from 0 to 1."""
    regularization_alpha: float = 1e-3
    """Ridge term of the inverses from which V is computed."""
    progressbar: bool = True
    """Show a progress bar while the V are computed."""
    runtime_offload_base_weight: bool = False
    """Read and saved for PEFT; a warning, because the base weights stay where they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.probability("frod_dropout")
        self.one_of("bias", self.bias, ("none", "all", "frod_only"))
        if not 0 <= self.sparse_rate <= 1:
            raise ConfigError(f"FrodConfig: sparse_rate must be from 0 to 1; got {self.sparse_rate}")
        if not self.regularization_alpha > 0:
            raise ConfigError(
                f"FrodConfig: regularization_alpha must be above 0; got {self.regularization_alpha}; try 1e-3"
            )
        if self.runtime_offload_base_weight:
            warnings.warn(
                "FrodConfig: runtime_offload_base_weight has no effect: the base weights stay on their device, because "
                "each forward pass uses them; leave it out",
                stacklevel=4,
            )


def role(path: str) -> str:
    """Return the name under which layers share a basis: the path's last two parts, or one after a block's number."""
    parts = path.split(".")
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return parts[-1] if len(parts) == 1 or parts[-2].isdigit() else f"{parts[-2]}_{parts[-1]}"


def _block_number(path: str, default: int) -> int:
    parts = path.split(".")
    after = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    return next((int(part) for part in (*after, *parts) if part.isdigit()), default)


class Bases(Shared):
    """V and the places of S of each role, computed on the CPU in float32 as PEFT does."""

    def __init__(self, config: FrodConfig, bases: Mapping[str, BaseWeight]):
        super().__init__()
        self.config = config
        self.layers: list[Frod] = []
        """All layers of the adapter; no submodules, because each has this as its own."""
        self.frod_V, self.frod_s_indices, self.frod_s_size = nn.Module(), nn.Module(), nn.Module()
        by_role: dict[str, dict[int, BaseWeight]] = defaultdict(dict)
        for number, (path, base) in enumerate(bases.items()):
            by_role[role(path)][_block_number(path, number)] = base
        generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
        for name in tqdm(sorted(by_role), desc="FRoD: bases", unit="role", disable=not config.progressbar):
            layers = [base for _, base in sorted(by_role[name].items())]
            size = layers[0].in_features
            if any(base.in_features != size for base in layers):
                raise ConfigError(
                    f"FROD: layers of one role share a basis, and those of {name!r} have different sizes: "
                    f"{sorted({base.in_features for base in layers})} inputs; name one of them in exclude_modules or "
                    "in another adapter"
                )
            device = layers[0].device
            self.frod_V.register_buffer(name, _basis(layers, config.regularization_alpha).to(device))
            self.frod_s_indices.register_buffer(name, _places(size, config.sparse_rate, generator).to(device))
            self.frod_s_size.register_buffer(name, torch.tensor([size, size], device=device))

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        return super().checkpoint_tensors() if self.config.save_projection else {}

    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_checkpoint_tensors(tensors)
        for layer in self.layers:
            layer.decompose()


def _basis(layers: list[BaseWeight], ridge: float) -> Tensor:
    """Return V (i, i) of layers with i inputs, rounded to their type; without values if they have none."""
    weights = [base.read_unmerged() for base in layers]
    size, dtype = layers[0].in_features, weights[0].dtype
    if any(weight.is_meta for weight in weights):
        return torch.empty(size, size, dtype=dtype, device="meta")
    stacked = torch.cat([weight.to("cpu", torch.float32) for weight in weights])
    if len(stacked) < size:
        return torch.linalg.svd(stacked, full_matrices=True)[2].T.to(dtype)
    q, r = torch.linalg.qr(stacked)
    eye = torch.eye(size, dtype=torch.float32, device="cpu")
    grams = [part.T @ part + ridge * eye for part in q.split([len(weight) for weight in weights])]
    mean = torch.stack([torch.linalg.inv(gram) for gram in grams]).sum(0) / len(grams)
    return (r.T @ torch.linalg.eigh(mean)[1]).to(dtype)


def _count(size: int, rate: float) -> int:
    """Return the number of trained entries of S for layers with `size` inputs."""
    return min(max(int(size * size * rate), 1 if rate else 0), size * (size - 1))


def _places(size: int, rate: float, generator: torch.Generator) -> Tensor:
    """Draw places (2, n), rows and columns, of a square matrix of this size off its diagonal."""
    if not (count := _count(size, rate)):
        return torch.empty(2, 0, dtype=torch.long, device="cpu")
    chosen = torch.randperm(size * (size - 1), generator=generator, device="cpu")[:count]
    rows, columns = chosen // (size - 1), chosen % (size - 1)
    return torch.stack([rows, columns + (columns >= rows).long()])


@register("FROD", FrodConfig)
class Frod(Adapter):
    """FRoD at one layer."""

    dropout_option = "frod_dropout"

    shared: Bases
    frod_U: Tensor
    start_lambda_l: Tensor

    def __init__(self, config: FrodConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        self.config, self.role = config, role(path)
        self.add_dropout()
        size = base.in_features
        self.frod_lambda_l = nn.Parameter(torch.empty(size))
        self.frod_lambda_s_values = nn.Parameter(torch.empty(_count(size, config.sparse_rate)))
        self.register_buffer("frod_U", torch.empty(base.out_features, size))
        self.register_buffer("start_lambda_l", torch.empty(size))

    @classmethod
    def make_shared(cls, config: FrodConfig, bases: Mapping[str, BaseWeight]) -> Bases:
        return Bases(config, bases)

    @classmethod
    def link(cls, config: FrodConfig, adapters: Mapping[str, Adapter]) -> None:
        for adapter in adapters.values():
            adapter.shared.layers.append(adapter)

    @torch.no_grad()
    def decompose(self) -> None:
        """Compute U and Λ₀ from V and the base's weight."""
        weight, v = self.base.read_unmerged(), self._of_role("frod_V")
        if weight.is_meta or v.is_meta:
            return  # a state dict will bring both
        w, v = weight.to("cpu", torch.float64), v.to("cpu", torch.float64)
        try:
            b = torch.linalg.solve(v, w.T).T
        except RuntimeError:  # V is singular
            b = w @ torch.linalg.pinv(v, rtol=1e-6).T
        lengths = torch.linalg.norm(b, dim=0)
        u = torch.where(lengths > 1e-12, b / lengths.clamp_min(1e-12), 0)
        dtype = self._start_type()
        wide = torch.promote_types(dtype, torch.float32)
        self.frod_U = u.to(wide).to(self.frod_U.device, dtype)
        self.start_lambda_l.copy_(lengths.to(wide).to(dtype))

    def _start_type(self) -> torch.dtype:
        """Return the type to which start values are rounded; Λ₀ is rounded as Λ is, so that both cancel."""
        base = self.base
        return base.activation_dtype or base.dtype

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.decompose()
        self.frod_lambda_l.copy_(self.start_lambda_l)
        nn.init.zeros_(self.frod_lambda_s_values)
        if not self.config.init_weights:  # PEFT draws on the device and in the type of the base
            values, lengths, dtype = self.frod_lambda_s_values, self.frod_lambda_l, self._start_type()
            values.copy_(torch.empty_like(values, dtype=dtype).normal_(std=0.1))
            lengths.copy_(lengths.to(dtype) + torch.randn_like(lengths, dtype=dtype) * 0.1)

    def prepare_to_read(self) -> None:
        """Do nothing: U and Λ₀ are computed once V is read."""

    def _of_role(self, name: str) -> Tensor:
        return self.shared.get_buffer(f"{name}.{self.role}")

    def _core(self) -> Tensor:
        """Return S + Λ − Λ₀ (i, i)."""
        size, device = len(self.frod_lambda_l), self.frod_lambda_l.device
        rows, columns = self._of_role("frod_s_indices").to(device)
        values = self.frod_lambda_s_values
        sparse = values.new_zeros(size * size).scatter(0, rows * size + columns, values).view(size, size)
        return sparse + torch.diag(self.frod_lambda_l - self.start_lambda_l)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.base.apply(self.dropped(x), self._of_role("frod_V").T.to(self.frod_lambda_l.device))
        return self.base.add_pointwise(y, F.linear(z, self._core().to(z.dtype)).to(y.dtype), self.frod_U)

    def delta_weight(self) -> Tensor:
        core = self._core()
        return self.frod_U.to(core) @ core @ self._of_role("frod_V").T.to(core)
