"""Processes that runs are forked from."""

from collections.abc import Iterator

import pytest
from killed_runs import Nursery


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()
