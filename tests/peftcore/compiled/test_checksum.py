"""`peftcore.compiled.checksum`: every change of a value changes the sum, and what is refused."""

from typing import Any

import pytest
import torch
from marked_tensor import Marked
from torch import Tensor, nn

from peftcore.compiled.checksum import checksum, compiled

pytestmark = pytest.mark.skipif(not compiled(), reason="nothing is compiled here; the log says why")


def weights(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 101), (37, 4), (37,)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_each_element_counts(dtype: torch.dtype) -> None:
    given = weights(dtype)
    sums = {checksum(*given)}
    for tensor in given:
        elements = tensor.view(-1)
        for i in range(len(elements)):
            value = elements[i].clone()
            elements[i] = value.nextafter(torch.tensor(9, dtype=dtype))
            sums.add(checksum(*given))
            elements[i] = value
    assert len(sums) == 1 + sum(tensor.numel() for tensor in given)
    assert checksum(*given) == checksum(*weights(dtype)) and None not in sums


def test_places_count() -> None:
    a, b, m = weights()
    found = {checksum(*given) for given in ((a, b, m), (a.flip(0), b, m), (a.roll(16, 1), b, m), (b, a, m), (a, m, b))}
    assert len(found) == 5
    assert checksum(a, b, m) == checksum(nn.Parameter(a), nn.Parameter(b.clone()), m.view(1, 37))


def test_the_sign_of_zero_and_numbers_that_are_none_count() -> None:
    a, b, _ = weights()
    found = {checksum(a, b, torch.full((3,), value)) for value in (0.0, -0.0, torch.nan, -torch.nan, torch.inf)}
    assert len(found) == 5


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize(
    "change", [lambda t: None, lambda t: t.to("meta"), lambda t: t.as_subclass(Marked), lambda t: t[..., ::2]]
)
def test_what_does_not_fit(change: Any, place: int) -> None:
    given = weights()
    assert checksum(*given) is not None
    changed: Any = [change(each) if i == place else each for i, each in enumerate(given)]
    assert checksum(*changed) is None


def test_inside_of_transforms() -> None:
    _, b, m = weights()
    found: list[int | None] = []
    torch.vmap(lambda a: found.append(checksum(a, b, m)) or a)(torch.ones(2, 3))
    assert found == [None]
