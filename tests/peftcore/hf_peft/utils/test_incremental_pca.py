"""Principal components of rows in batches: those of HF PEFT's class, and of all rows at once."""

from typing import Any

import pytest
import torch
from peft.utils.incremental_pca import IncrementalPCA as Theirs
from peftcore.utils.incremental_pca import IncrementalPCA as Ours

ATTRIBUTES = (
    *("components_", "singular_values_", "explained_variance_", "explained_variance_ratio_", "noise_variance_"),
    *("mean_", "var_", "n_samples_seen_"),
)


def rows(n: int = 60, features: int = 7, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scales = torch.arange(features, 0, -1, dtype=dtype)
    return torch.randn(n, features, generator=generator, dtype=dtype) * scales + 3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_components": 3},
        {"n_components": 3, "batch_size": 8},
        {"n_components": 5, "batch_size": 16, "copy": False},
        {"n_components": 2, "batch_size": 20, "lowrank": True, "lowrank_seed": 1},
        {"n_components": 2, "batch_size": 20, "lowrank": True, "lowrank_seed": 1, "lowrank_q": 3, "lowrank_niter": 1},
    ],
)
def test_components_are_those_of_hf_peft(options: dict[str, Any]) -> None:
    data = rows()
    fitted = [kind(**options).fit(data.clone()) for kind in (Ours, Theirs)]
    for attribute in ATTRIBUTES:
        ours, theirs = (getattr(one, attribute) for one in fitted)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, check_dtype=attribute != "noise_variance_")
    torch.testing.assert_close(fitted[0].transform(data), fitted[1].transform(data))
    assert fitted[0].batch_size == fitted[1].batch_size


def test_all_components_of_batches_are_those_of_all_rows() -> None:
    data = rows()
    pca = Ours()
    for batch in data.split([20, 25, 15]):
        assert pca.partial_fit(batch) is pca
    _, values, _ = torch.linalg.svd(data - data.mean(0), full_matrices=False)
    torch.testing.assert_close(pca.singular_values_, values)
    torch.testing.assert_close(pca.mean_, data.mean(0))
    torch.testing.assert_close(pca.var_, data.var(0, correction=0))
    torch.testing.assert_close(pca.explained_variance_ratio_.sum(), torch.tensor(1.0, dtype=torch.float64))


def test_float32_and_lists_are_taken_as_by_hf_peft() -> None:
    data = rows(dtype=torch.float32)
    for given in (data, data.tolist(), data.half()):
        ours, theirs = (kind(2).partial_fit(given) for kind in (Ours, Theirs))
        assert ours.components_.dtype == theirs.components_.dtype == torch.float32
        torch.testing.assert_close(ours.components_, theirs.components_, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(10, 3, 0), (10, 3, 2), (10, 5, 2), (4, 5, 0), (0, 5, 0)])
def test_batches_are_those_of_hf_peft(sizes: tuple[int, int, int]) -> None:
    assert list(Ours.gen_batches(*sizes)) == list(Theirs.gen_batches(*sizes))


def test_the_input_stays_as_it_is() -> None:
    data = rows()
    before = data.clone()
    Ours(2, batch_size=20).fit(data)
    assert torch.equal(data, before)


def test_what_does_not_fit_is_refused() -> None:
    for options, message in (
        ({"lowrank": True}, "needs n_components or lowrank_q"),
        ({"lowrank": True, "n_components": 4, "lowrank_q": 3}, "must be at least n_components=4; got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            Ours(**options)  # type: ignore[arg-type]
    for shape in ((3, 9), (9, 3)):
        with pytest.raises(ValueError, match="n_components=4 must not exceed the batch's rows and features"):
            Ours(4).partial_fit(torch.ones(shape))
    with pytest.raises(ValueError, match="the first batch had 7 features; got 6"):
        Ours(2).partial_fit(rows()).partial_fit(rows(features=6))
