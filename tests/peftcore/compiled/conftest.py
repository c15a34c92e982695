"""Fixtures of the tests of compiled code."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def no_grad() -> Iterator[None]:
    """Gradients are off for the test."""
    with torch.no_grad():
        yield
