"""The dropout mask is random, reproducible and unbiased."""

import pytest
import torch

from peftcore.kernels.seeded_dropout import Dropout


@pytest.mark.parametrize("p", [0.01, 0.05, 0.1, 0.5])
def test_the_mask_drops_each_element_with_its_probability(p: float) -> None:
    torch.manual_seed(0)
    x = torch.zeros(1000, 1000)
    dropout = Dropout(p)
    mask, bits = dropout.draw(x)
    keep = mask.keep
    assert set(keep.unique().tolist()) == {0, 1} and torch.equal(keep, dropout.again(x, bits).keep)
    here = dropout.threshold / 256
    assert abs(here - p) < 1 / 256 and dropout.scale == pytest.approx(1 / (1 - here))
    dropped, spread = (keep == 0).double(), (here * (1 - here)) ** 0.5
    assert abs(dropped.mean() - here) < 4 * spread / 1000  # four standard deviations
    for axis in (0, 1):  # and by itself: rows and columns vary as independent draws do
        assert abs(dropped.mean(axis).std() / (spread / 1000**0.5) - 1) < 0.1
    neighbours = ((dropped[:, 1:] - here) * (dropped[:, :-1] - here)).mean() / spread**2
    assert abs(neighbours) < 5e-3
    assert not torch.equal(keep, Dropout(p).draw(x)[0].keep)
    thresholds = torch.tensor([Dropout(p).threshold / 256 for _ in range(20_000)])
    assert abs(thresholds.mean() - p) < 1e-4
    torch.manual_seed(0)
    assert torch.equal(keep, Dropout(p).draw(x)[0].keep)
