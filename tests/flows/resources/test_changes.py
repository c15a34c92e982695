"""Alternatives that need less memory: the same training, each with its own peak, the smallest saving first."""

from dataclasses import dataclass
from typing import Any

import pytest
from resource_cases import params

from flows.params import Params
from flows.paths import Paths
from flows.resources.batches import workload
from flows.resources.changes import Change, changes
from flows.resources.static_memory import StaticMemory
from flows.stages.detect import without_weights

LIBRARIES, REST = 3_000_000, 5_000_000


@dataclass
class Alternatives:
    """The alternatives of a run and what they are alternatives to."""

    run: Params
    config: Any
    peak: int
    found: list[Change]


@pytest.fixture
def found(paths: Paths) -> Any:
    """`found(train={...})`: the alternatives to these parameters on the prepared rows."""

    def find(limit: int = 0, **sections: Any) -> Alternatives:
        run, config = params(**sections), without_weights(paths.base).config
        counted = StaticMemory(config, run, workload(run, paths))
        peak = max(LIBRARIES + counted.loading, counted.peak + REST)
        return Alternatives(run, config, peak, changes(config, run, paths, counted, LIBRARIES, REST, limit))

    return find


def rows_of_a_step(change: Change, run: Params) -> int:
    size = change.params.get("train.batch_size", run.train.batch_size)
    return size * change.params.get("train.gradient_accumulation", run.train.gradient_accumulation)


def with_values(run: Params, change: Change) -> Params:
    """The parameters as a user would write them into params.yaml."""
    sections = run.model_dump()
    for key, value in change.params.items():
        section, name = key.split(".")
        sections[section][name] = value
    return Params.model_validate(sections)


def test_an_optimiser_step_keeps_its_rows(found: Any) -> None:
    there = found(train={"batch_size": 4, "gradient_accumulation": 2})
    smaller = [change for change in there.found if "train.batch_size" in change.params]
    assert {change.params["train.batch_size"] for change in smaller} == {2, 1}
    assert {rows_of_a_step(change, there.run) for change in there.found} == {8}


def test_each_peak_is_that_of_a_run_with_these_parameters_and_the_smallest_saving_comes_first(
    found: Any, paths: Paths
) -> None:
    there = found()
    for change in there.found:
        other = with_values(there.run, change)
        memory = StaticMemory(there.config, other, workload(other, paths))
        assert change.peak == max(LIBRARIES + memory.loading, memory.peak + REST), change.params
        assert change.mapped == memory.sizes.mapped
    peaks = [change.peak for change in there.found]
    assert peaks == sorted(peaks, reverse=True) and min(peaks) < there.peak
    assert len(there.found[-1].params) > 1, "all of them together save most"


def test_an_alternative_fits_if_all_but_the_mapped_file_is_within_the_limit(found: Any) -> None:
    needed = [change.peak - change.mapped for change in found().found]
    least = min(needed)
    assert [change.fits for change in found(limit=least).found] == [size == least for size in needed]
    assert not any(change.fits for change in found(limit=least - 1).found)


@pytest.mark.parametrize(("storage", "offered"), [("none", True), ("int8", True), ("nf4", False), ("fp4", False)])
def test_four_bits_are_offered_for_a_base_that_is_stored_in_more(found: Any, storage: str, offered: bool) -> None:
    there = found(quantization={"storage": storage})
    assert any("quantization.storage" in change.params for change in there.found) == offered


def test_a_pack_is_halved_unless_a_row_would_not_fit(found: Any) -> None:
    """The longest row has 29 tokens."""
    halved = found(train={"batching": "packed", "pack_tokens": 64}).found
    assert any(change.params.get("train.pack_tokens") == 32 for change in halved)
    short = found(train={"batching": "packed", "pack_tokens": 40}).found
    assert short and not any("train.pack_tokens" in change.params for change in short)


def test_a_run_that_needs_least_already_has_no_alternative(found: Any) -> None:
    least = {"batch_size": 1, "gradient_checkpointing": "offload"}
    assert found(train=least).found == []
