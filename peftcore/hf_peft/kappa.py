"""KappaTune: targets whose weights have the smallest condition numbers κ = σ_max/σ_min. arXiv:2506.16289."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from peftcore.bases import base_weight
from peftcore.errors import ConfigError

_SUFFIXES = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")
"""Ends of the names of raw parameters of experts."""


class KappaTuneSelector:
    """Condition numbers of a model's linear layers and of its experts, computed at the first call.

    Args:
        model: the model; weights of 4 and 8 bits are expanded one at a time.
        max_dim_size_to_analyze: matrices with a larger side are left out.
        moe_param_suffixes: ends of the names of 3-dimensional parameters that hold experts; None for the usual ones.
        show_progress: show a progress bar.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ):
        self.model, self.max_dim_size_to_analyze, self.show_progress = model, max_dim_size_to_analyze, show_progress
        self.moe_param_suffixes = _SUFFIXES if moe_param_suffixes is None else tuple(moe_param_suffixes)
        self._of_modules: dict[str, float] | None = None
        self._of_parameters: dict[str, float] | None = None

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Return the paths of linear layers, the smallest condition number first.

        Args:
            top_p: return this share of the layers, at least one; only without `num_modules`.
            num_modules: return so many layers.
            threshold: return the layers with at most this condition number; only without the other two.
        """
        if self._of_modules is None:
            layers = [(path, m) for path, m in self.model.named_modules() if isinstance(m, nn.Linear)]
            self._of_modules = {
                path: _condition_number(_weight(layer, path))
                for path, layer in self._progress(layers)
                if max(layer.in_features, layer.out_features) <= self.max_dim_size_to_analyze
            }
        return _smallest(self._of_modules, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Return the paths of experts' parameters, the smallest mean condition number first.

        Args:
            top_p: return this share of the parameters, at least one; only without `num_modules`.
            num_modules: return so many parameters.
            threshold: return those with at most this condition number; only without the other two.
        """
        if self._of_parameters is None:
            named = self.model.named_parameters()
            raw = [(path, p) for path, p in named if path.endswith(self.moe_param_suffixes) and p.dim() == 3]
            self._of_parameters = {
                path: sum(map(_condition_number, experts)) / len(experts)
                for path, experts in self._progress(raw)
                if max(experts.shape[1:]) <= self.max_dim_size_to_analyze
            }
        return _smallest(self._of_parameters, top_p, num_modules, threshold)

    def _progress(self, parts: Sequence[tuple[str, Any]]) -> Iterable[tuple[str, Any]]:
        return tqdm(parts, desc="condition numbers", unit="weight", disable=not self.show_progress)


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """Return `target_modules` and `target_parameters` of the weights with the smallest condition numbers.

    Args:
        model: the model.
        top_p: share of the layers, and of the experts' parameters, to return; at least one of each.
        max_dim_size_to_analyze: matrices with a larger side are left out.
        moe_param_suffixes: ends of the names of 3-dimensional parameters that hold experts; None for the usual ones.
        show_progress: show a progress bar.

    Returns:
        Arguments of a configuration; `target_parameters` is None for a model without experts.

    Raises:
        ConfigError: `top_p` is not in (0, 1].
    """
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    parameters = selector.get_best_target_parameters(top_p)
    return {"target_modules": selector.get_best_targets(top_p), "target_parameters": parameters or None}


def _weight(layer: nn.Linear, path: str) -> Tensor:
    return layer.weight if layer.weight.is_floating_point() else base_weight(layer, path).read()


@torch.no_grad()
def _condition_number(weight: Tensor) -> float:
    values = torch.linalg.svdvals(weight.float())
    return float(values[0] / (values[-1] + 1e-8))


def _smallest(numbers: dict[str, float], top_p: float | None, count: int | None, threshold: float | None) -> list[str]:
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p must be above 0 and at most 1; got {top_p!r}")
    paths = sorted(numbers, key=lambda path: numbers[path])
    if count is not None:
        return paths[:count]
    if top_p is not None:
        return paths[: max(1, int(len(paths) * top_p))]
    return paths if threshold is None else [path for path in paths if numbers[path] <= threshold]
