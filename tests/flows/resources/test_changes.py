"""Alternatives that need less memory: the same training, each with its own peak, the smallest saving first."""

from dataclasses import dataclass
from typing import Any

import pytest
from resource_cases import params

from flows.params import Params
from flows.paths import Paths
from flows.resources.batches import workload
from flows.resources.changes import Change, _choices, alternatives, changes
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
        return Alternatives(
            run, config, peak, changes(alternatives(config, run, paths, counted), LIBRARIES, REST, limit)
        )

    return find


def with_values(run: Params, values: dict[str, Any]) -> Params:
    """The parameters as a user would write them into params.yaml."""
    sections = run.model_dump()
    for key, value in values.items():
        section, name = key.split(".")
        sections[section][name] = value
    return Params.model_validate(sections)


@pytest.mark.parametrize("rows", [(4, 2), (6, 1), (1, 8)])
def test_an_optimiser_step_keeps_its_rows(rows: tuple[int, int]) -> None:
    run = params(train={"batch_size": rows[0], "gradient_accumulation": rows[1]})
    others = [with_values(run, values).train for values in _choices(run)]
    assert {one.batch_size * one.gradient_accumulation for one in others} == {rows[0] * rows[1]}
    assert {one.batch_size for one in others} == {rows[0], rows[0] // 2 or 1, 1}


@pytest.mark.slow
def test_each_peak_is_that_of_a_run_with_these_parameters_and_the_smallest_saving_comes_first(
    found: Any, paths: Paths
) -> None:
    there = found()
    for change in there.found:
        other = with_values(there.run, change.params)
        memory = StaticMemory(there.config, other, workload(other, paths))
        assert change.peak == max(LIBRARIES + memory.loading, memory.peak + REST), change.params
        assert change.mapped == memory.sizes.mapped
    peaks = [change.peak for change in there.found]
    assert peaks == sorted(peaks, reverse=True) and min(peaks) < there.peak
    assert len(there.found[-1].params) > 1, "all of them together save most"

    # an alternative fits if all but the mapped file is within the limit
    needed = [change.peak - change.mapped for change in there.found]
    least = min(needed)
    assert [change.fits for change in found(limit=least).found] == [size == least for size in needed]


@pytest.mark.parametrize(("storage", "offered"), [("none", True), ("int8", True), ("nf4", False), ("fp4", False)])
def test_four_bits_are_offered_for_a_base_that_is_stored_in_more(storage: str, offered: bool) -> None:
    stored = [values.get("quantization.storage") for values in _choices(params(quantization={"storage": storage}))]
    assert ("nf4" in stored) == offered and set(stored) <= {None, "nf4"}


@pytest.mark.slow
def test_a_pack_is_halved_unless_a_row_would_not_fit(found: Any) -> None:
    """The longest row has 29 tokens."""
    halved = found(train={"batching": "packed", "pack_tokens": 64}).found
    assert any(change.params.get("train.pack_tokens") == 32 for change in halved)
    short = found(train={"batching": "packed", "pack_tokens": 40}).found
    assert short and not any("train.pack_tokens" in change.params for change in short)


@pytest.mark.parametrize("recomputed", ["blocks", "offload"])
def test_a_run_that_needs_least_already_has_no_alternative(recomputed: str) -> None:
    assert _choices(params(train={"batch_size": 1, "gradient_checkpointing": recomputed})) == []
