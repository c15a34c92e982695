"""`peft.utils.incremental_pca`: principal components of rows that come in batches (Ross et al., IJCV 77, 2008).

The components V with singular values S of all rows so far stand for these rows: the SVD of the rows

    [diag(S) V; X − mean(X); √(n m / (n + m)) (mean − mean(X))]

for n rows so far and a batch X of m rows is that of all n + m rows around their common mean.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from peftcore.errors import ConfigError

__all__ = ["IncrementalPCA"]


class IncrementalPCA:
    """Principal components of rows, updated with each batch.

    After the first batch, it has `components_` (k, f), `singular_values_`, `explained_variance_`,
    `explained_variance_ratio_` (k,), `mean_` and `var_` (f,) in float64, `noise_variance_` and `n_samples_seen_`, for k
    components and f features.

    Args:
        n_components: the number of components (count); None for the smaller size of the first batch.
        copy: without effect: the input never changes.
        batch_size: rows of a batch of `fit` (count); None for five times the features.
        svd_driver: method of `torch.linalg.svd` on CUDA; None for PyTorch's choice.
        lowrank: use `torch.svd_lowrank`, which is approximate and faster.
        lowrank_q: its rank (count); None for twice the components.
        lowrank_niter: its iterations (count).
        lowrank_seed: seed of its random start; None for the global generator.

    Raises:
        ConfigError: `lowrank_q` does not fit the components; also a ValueError.
    """

    components_: Tensor
    singular_values_: Tensor
    explained_variance_: Tensor
    explained_variance_ratio_: Tensor
    noise_variance_: Tensor
    mean_: Tensor
    var_: Tensor
    n_samples_seen_: Tensor

    def __init__(
        self,
        n_components: int | None = None,
        copy: bool | None = True,
        batch_size: int | None = None,
        svd_driver: str | None = None,
        lowrank: bool = False,
        lowrank_q: int | None = None,
        lowrank_niter: int = 4,
        lowrank_seed: int | None = None,
    ):
        if lowrank and lowrank_q is None:
            if n_components is None:
                raise ConfigError("IncrementalPCA: lowrank=True needs n_components or lowrank_q; give one")
            lowrank_q = 2 * n_components
        if lowrank and n_components is not None and lowrank_q is not None and lowrank_q < n_components:
            raise ConfigError(
                f"IncrementalPCA: lowrank_q must be at least n_components={n_components}; got {lowrank_q}"
            )
        self.n_components, self.copy, self.batch_size = n_components, copy, batch_size
        self.svd_driver = svd_driver
        self.lowrank, self.lowrank_q = lowrank, lowrank_q
        self.lowrank_niter, self.lowrank_seed = lowrank_niter, lowrank_seed
        self.n_features_: int | None = None

    def fit(self, X: Tensor, check_input: bool = True) -> "IncrementalPCA":
        """Update the components with all rows, in batches of `batch_size`.

        Args:
            X: rows (n, f).
            check_input: False for a tensor that `partial_fit` accepts.

        Returns:
            The object itself.

        Raises:
            ConfigError: see `partial_fit`.
        """
        rows = self._checked(X) if check_input else X
        if self.batch_size is None:
            self.batch_size = 5 * rows.shape[1]
        for batch in self.gen_batches(len(rows), self.batch_size, self.n_components or 0):
            self.partial_fit(rows[batch], check_input=False)
        return self

    def partial_fit(self, X: Tensor, check_input: bool = True) -> "IncrementalPCA":
        """Update the components with one batch.

        Args:
            X: rows (m, f); anything that `torch.tensor` takes becomes float32.
            check_input: False for a floating-point tensor of the right shape.

        Returns:
            The object itself.

        Raises:
            ConfigError: there are more components than rows or features, or the features are not those of the first
                batch; also a ValueError.
        """
        rows = self._checked(X) if check_input else X
        m, features = rows.shape
        is_first = self.n_features_ is None
        if is_first:
            self.n_features_ = features
            self.n_components = self.n_components or min(m, features)
            self.n_samples_seen_ = torch.tensor([0], device=rows.device)
        if features != self.n_features_:
            raise ConfigError(f"IncrementalPCA: the first batch had {self.n_features_} features; got {features}")
        assert self.n_components is not None
        n, seen = self.n_samples_seen_, self.n_samples_seen_ + m
        batch_mean = rows.mean(0, dtype=torch.float64)
        squares = (rows - batch_mean).square().sum(0, dtype=torch.float64)
        if is_first:
            mean, rows = batch_mean, rows - batch_mean.to(rows.dtype)
        else:
            share = (n.double() / seen * m).sqrt()
            mean = self.mean_ + (batch_mean - self.mean_) * (m / seen.double())
            squares = squares + self.var_ * n + (share * (self.mean_ - batch_mean)).square()
            former = self.singular_values_[:, None] * self.components_
            shift = share * (self.mean_ - batch_mean)
            rows = torch.vstack((former, rows - batch_mean.to(rows.dtype), shift[None].to(rows.dtype)))
        values, components = self._svd(rows)
        variance = values.square() / (seen - 1)
        k = self.n_components
        self.noise_variance_ = variance.new_tensor(0.0) if k in (m, features) else variance[k:].mean()
        self.components_, self.singular_values_, self.explained_variance_ = components[:k], values[:k], variance[:k]
        self.explained_variance_ratio_ = (values.square() / squares.sum())[:k]
        self.mean_, self.var_, self.n_samples_seen_ = mean, squares / seen, seen
        return self

    def transform(self, X: Tensor) -> Tensor:
        """Return the coordinates (n, k) of rows (n, f), in the dtype of the rows around the mean."""
        rows = X - self.mean_
        return (rows.double() @ self.components_.double().T).to(rows.dtype)

    @staticmethod
    def gen_batches(n: int, batch_size: int, min_batch_size: int = 0) -> Iterator[slice]:
        """Yield the slices of batches; the last one takes more rows if it left fewer than `min_batch_size`.

        Args:
            n: rows (count).
            batch_size: rows of a batch (count).
            min_batch_size: smallest number of rows of the last batch (count).
        """
        start = 0
        for _ in range(n // batch_size):
            if start + batch_size + min_batch_size <= n:
                yield slice(start, start + batch_size)
                start += batch_size
        if start < n:
            yield slice(start, n)

    def _checked(self, X: Tensor) -> Tensor:
        rows = torch.as_tensor(X)
        if rows.dtype not in (torch.float32, torch.float64) or not isinstance(X, Tensor):
            rows = rows.float()
        if self.n_components is not None and self.n_components > min(rows.shape):
            raise ConfigError(
                f"IncrementalPCA: n_components={self.n_components} must not exceed the batch's rows and features; "
                f"got {tuple(rows.shape)}"
            )
        return rows

    def _svd(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return singular values and right singular vectors; the largest element of each vector is positive."""
        if self.lowrank:
            devices = [rows.device] if rows.is_cuda else []
            with torch.random.fork_rng(devices, enabled=self.lowrank_seed is not None):
                if self.lowrank_seed is not None:
                    torch.manual_seed(self.lowrank_seed)
                _, values, right = torch.svd_lowrank(rows, q=self.lowrank_q, niter=self.lowrank_niter)
            components = right.mH
        else:
            _, values, components = torch.linalg.svd(rows, full_matrices=False, driver=self.svd_driver)
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        return values, components * largest.sign()
