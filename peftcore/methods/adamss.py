"""AdaMSS: ΔW, Δb = Σ_k of B_k A_k V at the rows of cluster k, V fixed directions of (W, b). neurips.cc, 2025, 119606.

V holds the r largest right singular vectors of W, with the bias as one more column, and k-means clusters the rows of
the left ones. Each cluster trains a small A_k and B_k. A directory does not hold the clusters, so loading computes them
again from the base's weight. With `use_asa`, training freezes all but the most important clusters (subspaces).

Shapes: i in_features, one more with a bias, o out_features, r rank, at most o and i, n_k rows and r_k rank of a
cluster; V = adamss_newB (r, i), A_k (r_k, r), B_k (n_k, r_k).
PEFT keeps one cluster fewer than asa_target_subspaces, and so does this file. PEFT adapts `nn.Linear` only.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig
from peftcore.errors import ConfigError, require_extra
from peftcore.kernels.factors import Factors
from peftcore.registry import register

_OF_ASA = (
    *("asa_target_subspaces", "init_warmup", "final_warmup", "mask_interval"),
    *("asa_importance_beta", "asa_uncertainty_beta", "asa_schedule_exponent"),
)


@dataclass
class AdamssConfig(TunerConfig):
    """AdaMSS's options under PEFT's names. None for an option of ASA means its default."""

    not_saved_if_none: ClassVar[tuple[str, ...]] = ("exclude_modules",)

    r: int = 100
    """Singular vectors of each weight (count); a smaller weight gives fewer."""
    num_subspaces: int = 5
    """Clusters of a weight's rows (count); a layer with fewer outputs has fewer."""
    subspace_rank: int = 1
    """Rank of a cluster's change (count), at most."""
    init_weights: str | bool | None = "orthogonal"
    """"orthogonal": every B_k starts at zero; None or False: B_k is random, for tests."""
    use_asa: bool = False
    """Freeze the least important clusters in training, step by step."""
    asa_target_subspaces: int = 50
    """Clusters of the whole model that train after `final_warmup` (count)."""
    init_warmup: int = 50
    """First step that measures the importance of clusters."""
    final_warmup: int = 1000
    """Step from which on nothing more is frozen."""
    mask_interval: int = 100
    """Steps between two decisions; each starts the measuring anew."""
    asa_importance_beta: float = 0.85
    """Decay per step of the moving average of the importance |parameter · gradient|."""
    asa_uncertainty_beta: float = 0.85
    """Decay per step of the moving average of the importance's changes."""
    asa_schedule_exponent: float = 3.0
    """1: the number of trained clusters falls linearly; a larger exponent lets it fall earlier."""
    use_dynamic_rank: bool = False
    """Take as rank of a cluster the number of its singular values above `svd_threshold` times the largest one."""
    svd_threshold: float = 0.1
    """Share of the largest singular value, for use_dynamic_rank."""
    random_seed: int = 0
    """Seed of the random projection in the SVD of W; a directory is read with the seed of its configuration."""

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            if option.name in _OF_ASA and getattr(self, option.name) is None:
                setattr(self, option.name, option.default)
        super().__post_init__()
        self.positive("r", "num_subspaces", "subspace_rank")
        self.init_weights = self.init_weights or None
        if self.init_weights not in ("orthogonal", None):
            raise ConfigError(f"AdamssConfig: init_weights must be 'orthogonal' or None; got {self.init_weights!r}")
        if self.use_asa:
            self.positive("mask_interval", "asa_target_subspaces")
            if self.init_warmup >= self.final_warmup:
                raise ConfigError(
                    f"AdamssConfig: init_warmup must be below final_warmup={self.final_warmup}; got {self.init_warmup}"
                )
            if self.asa_schedule_exponent <= 0:
                raise ConfigError(
                    f"AdamssConfig: asa_schedule_exponent must be above 0; got {self.asa_schedule_exponent!r}"
                )

    def without_effect(self) -> dict[str, str]:
        """Return the options that were set although the part that reads them is off."""
        defaults = {option.name: option.default for option in dataclasses.fields(self)}
        needs = dict.fromkeys(() if self.use_asa else _OF_ASA, "use_asa=True")
        needs |= {} if self.use_dynamic_rank else {"svd_threshold": "use_dynamic_rank=True"}
        return {name: setting for name, setting in needs.items() if getattr(self, name) != defaults[name]}

    def trained_subspaces(self, step: int, total: int) -> int:
        """Return how many of `total` clusters the schedule lets train at a step of the warm-up."""
        left = 1 - (step - self.init_warmup) / (self.final_warmup - self.init_warmup)
        return int(self.asa_target_subspaces + (total - self.asa_target_subspaces) * left**self.asa_schedule_exponent)


def _clusters(rows: Tensor, count: int) -> list[Tensor]:
    """Return the numbers of the rows of each cluster, found by k-means as PEFT calls it."""
    require_extra("adamss", "AdaMSS", "sklearn")
    from sklearn.cluster import KMeans

    options: dict[str, Any] = {"init": "random", "n_init": 1, "max_iter": 10, "random_state": 123456789}
    kmeans = KMeans(min(count, len(rows)), **options)
    labels = torch.from_numpy(kmeans.fit_predict(rows.cpu().numpy()))
    return [(labels == number).nonzero().flatten() for number in range(int(labels.max()) + 1)]


@register("ADAMSS", AdamssConfig)
class Adamss(Adapter):
    """AdaMSS at one layer."""

    adamss_newB: Tensor
    places: Tensor

    def __init__(self, config: AdamssConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        self.config, self.path = config, path
        left, right, clusters = self._decomposed()
        ranks = [min(len(rows), config.subspace_rank, len(right)) for rows in clusters]
        self.adamss_A = nn.ParameterList(torch.empty(rank, len(right)) for rank in ranks)
        self.adamss_B = nn.ParameterList(torch.empty(len(n), rank) for n, rank in zip(clusters, ranks, strict=True))
        self.register_buffer("adamss_newB", torch.empty(right.shape))
        self.register_buffer("places", torch.cat(clusters).argsort().to(base.device))
        self.start: tuple[Tensor, Tensor, list[Tensor]] | None = (left, right, clusters)
        self.has_clusters = not left.is_meta
        """False on a base without values, until a state dict brings the clusters."""
        self.importance: dict[str, Tensor] = {}
        """{name of a parameter: moving averages of its importance and of that importance's changes, stacked}"""

    @torch.no_grad()
    def _decomposed(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the left singular vectors (o, r), the right ones (r, i), and the rows of each cluster."""
        weight, bias = self.base.read_unmerged(), self.base.unmerged_bias
        weight = weight.float() if bias is None else torch.cat([weight, bias[:, None].to(weight)], 1).float()
        device = weight.device
        if weight.is_meta:
            r, clusters = min(self.config.r, *weight.shape), min(self.config.num_subspaces, len(weight))
            rows = torch.arange(len(weight), device="cpu").tensor_split(clusters)
            return weight.new_empty(len(weight), r), weight.new_empty(r, weight.shape[1]), list(rows)
        at: dict[str, Any] = {} if device.type == "cpu" else {"device_type": device.type}
        with torch.random.fork_rng([device] if at else [], **at):
            torch.manual_seed(self.config.random_seed)
            left, _, right = torch.svd_lowrank(weight, q=min(self.config.r, *weight.shape), niter=2)
        return left, right.T, _clusters(left, self.config.num_subspaces)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        left, right, clusters = self.start or self._decomposed()
        if left.is_meta:
            return
        dtype = self.base.dtype
        self.adamss_newB.copy_(right.to(dtype))
        for a, b, rows in zip(self.adamss_A, self.adamss_B, clusters, strict=True):
            part = left[rows.to(left.device)]
            gram, rank = part @ part.T, len(a)
            if self.config.use_dynamic_rank:
                values = torch.svd_lowrank(gram, q=len(gram), niter=2)[1]
                rank = max(1, min(rank, int((values > self.config.svd_threshold * values[0]).sum())))
            directions = torch.svd_lowrank(gram, q=rank, niter=2)[0]
            start_a = torch.linalg.qr(part.T @ directions).Q.T.to(dtype)
            start_b = torch.zeros(len(rows), rank, dtype=dtype, device=left.device)
            if self.config.init_weights is None:
                start_b = torch.randn(len(rows), rank, dtype=dtype, device=left.device) * 0.01
            a.data, b.data = start_a.to(a).contiguous(), start_b.to(b)

    def prepare_to_read(self) -> None:
        """Do nothing: a directory has all but the clusters, which are known."""

    def placed(self) -> None:
        self.start = None

    # -- forward and merging -----------------------------------------------------------------------------------------

    def _factors(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the factors (Σ_k r_k, i) and (o, Σ_k r_k) of ΔW, and between them the column of the bias."""
        down = torch.cat(list(self.adamss_A)) @ self.adamss_newB
        up = torch.block_diag(*self.adamss_B)[self.places]
        width = self.base.in_features
        return down[:, :width], down[:, width] if down.shape[1] > width else None, up

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        down, column, up = self._factors()
        h = self.base.apply(x, down).to(y.dtype)
        return self.base.add_pointwise(y, h if column is None else h + column.to(y.dtype), up)

    def exact_factors(self) -> Factors:
        down, _, up = self._factors()
        return Factors(down[None], up[None])

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        _, column, up = self._factors()
        return bias if column is None or bias is None else bias + (up @ column).to(bias)

    # -- disk --------------------------------------------------------------------------------------------------------

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        return {**super().checkpoint_tensors(), "adamss_newB": self.adamss_newB}

    def fits(self, key: str, tensor: Tensor) -> bool:
        if not self.has_clusters:
            raise ConfigError(f"ADAMSS: {self.path} has no values yet to cluster its rows by; load the base first")
        own = self.checkpoint_tensors()[key]
        if key == "adamss_newB":
            return tensor.shape == own.shape
        fixed = 1 if key.startswith("adamss_A") else 0  # the other size is the cluster's rank
        return tensor.dim() == 2 and tensor.shape[fixed] == own.shape[fixed]

    @torch.no_grad()
    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.adamss_newB.copy_(tensors["adamss_newB"])
        for name, key in self.checkpoint_keys().items():
            parameter = self.get_parameter(name)
            parameter.data = tensors[key].to(parameter, copy=True)

    def before_load(self, module: nn.Module, name: str, saved: Tensor) -> None:
        """Take over the sizes of a state dict, whose model may have had other clusters."""
        tensor = getattr(module, name)
        if isinstance(tensor, nn.Parameter) and saved.shape != tensor.shape:
            tensor.data = tensor.new_empty(saved.shape)
        self.has_clusters |= name == "places"

    @classmethod
    def config_to_save(cls, config: AdamssConfig, adapters: Mapping[str, Adapter]) -> AdamssConfig:
        """Return the configuration with all paths named if it excludes layers, which PEFT's AdaMSS cannot."""
        return config if config.exclude_modules is None else config.naming_targets(adapters)

    # -- training with `use_asa` -------------------------------------------------------------------------------------

    @torch.no_grad()
    def _measure(self) -> None:
        """Update the moving averages from the gradients that are there."""
        for name in self.checkpoint_keys():
            parameter = self.get_parameter(name)
            if parameter.grad is None:
                continue
            mean, change = self.importance.setdefault(name, torch.zeros(2, *parameter.shape, device=parameter.device))
            now = (parameter * parameter.grad).abs()
            change.lerp_((now - mean).abs().to(change), 1 - self.config.asa_uncertainty_beta)
            mean.lerp_(now.to(mean), 1 - self.config.asa_importance_beta)

    def _scores(self) -> dict[int, Tensor]:
        """Return {number of a cluster: importance times uncertainty} of the clusters that still train."""
        means = {name: both.prod(0).mean() for name, both in self.importance.items()}
        numbers = range(len(self.adamss_A))
        pairs = {k: [means.get(f"adamss_{side}.{k}") for side in "AB"] for k in numbers}
        return {k: a + b for k, (a, b) in pairs.items() if a is not None and b is not None}

    def _train(self, number: int, trains: bool) -> None:
        for parameter in (self.adamss_A[number], self.adamss_B[number]):
            parameter.requires_grad_(trains)
            if not trains:
                parameter.grad = None

    @classmethod
    def on_step(cls, config: AdamssConfig, adapters: Mapping[str, Any], step: int, optimizer: Any) -> None:
        if not config.use_asa or not config.init_warmup <= step <= config.final_warmup:
            return
        for adapter in adapters.values():
            adapter._measure()
        if step % config.mask_interval:
            return
        scores = {(path, k): score for path, a in adapters.items() for k, score in a._scores().items()}
        count = config.trained_subspaces(step, sum(len(adapter.adamss_A) for adapter in adapters.values()))
        if scores:
            values = torch.stack([score.float().cpu() for score in scores.values()])
            bound = values.sort(descending=True).values[count - 1] if count < len(values) else float("-inf")
            for (path, number), value in zip(scores, values, strict=True):
                adapters[path]._train(number, bool(value > bound))
        for adapter in adapters.values():
            adapter.importance.clear()

    def training_state(self) -> dict[str, Tensor]:
        if not self.config.use_asa:
            return {}
        trains = torch.tensor([parameter.requires_grad for parameter in self.adamss_A])
        return {"trains": trains, **{name: both.clone() for name, both in self.importance.items()}}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        for number, trains in enumerate(state["trains"].tolist()):
            self._train(number, trains)
        device = self.adamss_newB.device
        self.importance = {name: both.to(device) for name, both in state.items() if name != "trains"}
