"""CorDA: A and B start from SVD(W·C), with C the covariance of the layer's input. arXiv:2406.05223.

"ipm" trains the r directions that matter most to the data; "kpm" trains the r that matter least, to preserve knowledge.
Shapes: i in_features, o out_features, r rank; C (i, i), W (o, i).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from peftcore.errors import ConfigError
from peftcore.methods.lora.initialisation import Factors, Initialisation, draw_defaults
from peftcore.methods.lora.observer import Observer
from peftcore.methods.lora.variant import register_variant

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora
    from peftcore.methods.lora.config import LoraConfig

DEFAULTS: dict[str, Any] = {
    "corda_method": "ipm",
    "cache_file": None,
    "covariance_file": None,
    "verbose": False,
    "use_float16_for_covariance": False,
    "prune_temporary_fields": True,
}
"""`corda_config` under PEFT's names; all but the first are options of `preprocess_corda`."""


@dataclass
class CordaEigens:
    """Singular values and vectors of W·C that start the adapter of one layer; the attribute `eigens` of the layer."""

    S_WC: Tensor
    """(r,)"""
    U_WC: Tensor
    """(o, r)"""
    V_WC: Tensor
    """(i, r): right singular vectors, multiplied by the inverse of C."""


def all_options(chosen: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return all options of `corda_config`.

    Raises:
        ConfigError: For an unknown option, or an unknown `corda_method`.
    """
    options = {**DEFAULTS, **(chosen or {})}
    if unknown := sorted(options.keys() - DEFAULTS.keys()):
        raise ConfigError(f"corda_config: unknown {unknown}; known: {', '.join(DEFAULTS)}")
    if options["corda_method"] not in ("ipm", "kpm"):
        raise ConfigError(f"corda_config: corda_method must be 'ipm' or 'kpm'; got {options['corda_method']!r}")
    return options


def covariance(x: Tensor) -> Tensor:
    """Return the covariance (i, i) of one input (..., i), scaled by its largest element as in the authors' code."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows / rows.max().abs().clamp_min(torch.finfo(rows.dtype).tiny)
    return rows.T @ rows


def eigens_of(weight: Tensor, mean_covariance: Tensor, r: int, method: str) -> CordaEigens:
    """Return the r singular vectors of W·C that start an adapter.

    Args:
        weight: W (o, i) in float32.
        mean_covariance: C (i, i) in float32.
        r: Rank.
        method: "ipm" for the largest singular values, "kpm" for the smallest.
    """
    damped, inverse = _invertible(mean_covariance)
    u, s, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
    chosen = slice(None, r) if method == "ipm" else slice(len(s) - r, None)
    return CordaEigens(s[chosen].clone(), u[:, chosen].clone(), (vh[chosen] @ inverse).T)


def factors_of(eigens: CordaEigens, scaling: float) -> Factors:
    """Return A and B of one layer, singular values shared by both sides."""
    root = (eigens.S_WC / scaling).sqrt()
    return root[:, None] * eigens.V_WC.T, eigens.U_WC * root


class Corda(Observer):
    """Input covariances of every layer."""

    title = "CorDA"

    def __init__(self, config: "LoraConfig", layers: "Mapping[str, Lora]"):
        super().__init__(config, layers)
        options = all_options(config.corda_config)
        if unused := [name for name in DEFAULTS if name != "corda_method" and options[name] != DEFAULTS[name]]:
            raise ConfigError(
                f"corda_config: {unused[0]} is an option of preprocess_corda only; call that before get_peft_model, or "
                "leave the option out"
            )
        self.method = options["corda_method"]
        self.covariance: dict[str, Tensor] = {}
        self.samples: dict[str, int] = {}

    def observe(self, path: str, x: Tensor, y: Tensor) -> None:
        self.covariance[path] = self.covariance.get(path, torch.zeros(())) + covariance(x.float())
        self.samples[path] = self.samples.get(path, 0) + 1

    def factors(self, path: str, adapter: "Lora") -> Factors:
        weight = adapter.base.read_unmerged().float()
        mean = self.covariance[path] / self.samples[path]
        return factors_of(eigens_of(weight, mean, adapter.r, self.method), adapter.scaling)


def _invertible(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the covariance, with its diagonal raised until it is well conditioned, and the inverse."""
    identity = torch.eye(len(covariance), device=covariance.device)
    damp, mean = 0.01, covariance.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    while True:
        damped = covariance + damp * mean * identity
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, identity) < 0.05:
            return damped, inverse
        damp *= 2


@register_variant
class CordaStart(Initialisation):
    """Initialisation `init_lora_weights="corda"`: factors of SVD(W·C), subtracted from the base; needs data.

    The data come before get_peft_model (`preprocess_corda`), or after it (`initialize_from_data`).
    """

    names = ("corda",)
    observer = Corda
    required_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {"corda_config": DEFAULTS}
    subtracts = True
    prepared = "eigens"

    def initialise(self, lora: "Lora") -> None:
        draw_defaults(lora)  # A keeps these values until the data are there
        nn.init.zeros_(lora.lora_B_weight)
        if (eigens := self.prepared_for(lora)) is None:
            return
        if eigens.U_WC.shape != lora.lora_B_weight.shape or eigens.V_WC.T.shape != lora.lora_A_weight.shape:
            raise ConfigError(
                f"corda: preprocess_corda ran for rank {len(eigens.S_WC)}, and the adapter has rank {lora.r} at a "
                "layer of the same model; give both the same configuration"
            )
        lora.set_factors(*factors_of(eigens, lora.scaling))
        lora.subtract_start()
