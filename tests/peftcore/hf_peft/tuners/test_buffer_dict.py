"""A dictionary of buffers, as HF PEFT's."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from peft.tuners._buffer_dict import BufferDict as Theirs
from peftcore.tuners._buffer_dict import BufferDict as Ours
from torch import nn


@pytest.mark.parametrize("kind", [Ours, Theirs])
@pytest.mark.parametrize("persistent", [True, False])
def test_buffers_are_those_of_a_module(kind: Any, persistent: bool) -> None:
    buffers = kind({"b": torch.ones(2), "a": torch.zeros(3)}, persistent=persistent)
    assert list(buffers) == list(buffers.keys()) == ["a", "b"]  # a plain dictionary is sorted
    buffers.update(OrderedDict(d=torch.ones(1), c=torch.ones(1)))
    buffers.update([("f", torch.ones(1)), ("e", torch.ones(1))])
    buffers.update(kind(OrderedDict(h=torch.ones(1), g=torch.ones(1))))
    assert "".join(buffers) == "abdcfehg" and len(buffers) == 8
    assert (list(buffers.state_dict()) != []) == persistent
    assert "a" in buffers and buffers["b"].sum() == 2
    assert torch.equal(buffers.pop("b"), torch.ones(2)) and "b" not in buffers
    del buffers["a"]
    assert [name for name, _ in buffers.items()] == list("dcfehg") and len(list(buffers.values())) == 6
    owner = nn.Module()
    owner.tables = buffers
    assert owner.double().tables["d"].dtype == torch.float64
    assert repr(buffers).count("Buffer") == 7
    buffers.clear()
    assert len(buffers) == 0 and not buffers.state_dict()


@pytest.mark.parametrize("kind", [Ours, Theirs])
def test_what_is_no_buffer_is_refused(kind: Any) -> None:
    with pytest.raises(RuntimeError, match="called"):
        kind()(torch.ones(1))
    with pytest.raises(TypeError):
        kind().update(1)
    with pytest.raises(ValueError):
        kind().update([("a", torch.ones(1), 2)])
    with pytest.raises(KeyError):
        kind()["a"]
