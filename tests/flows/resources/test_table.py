"""An estimate as tables: each kind of memory, time and disk, and which alternatives fit."""

from dataclasses import replace
from typing import Any

import pytest
from resource_cases import GIB

from flows.resources.changes import Change
from flows.resources.estimate import Estimate
from flows.resources.table import duration, print_estimate

PLAN = Estimate(
    model="LlamaForCausalLM",
    blocks=32,
    batch=(8, 320),
    optimizer_steps=150,
    trainable=39_976_960,
    memory={"base weights, quantised": 3 * GIB, "adapter": GIB // 4},
    peak=4 * GIB,
    loading_peak=2 * GIB,
    mapped=GIB // 2,
    limit=3 * GIB,
    free=GIB,
    device="machine",
    time={"forward and backward": 540.0, "optimiser": 60.0, "checkpoints": 30.0},
    disk={"base": 0, "adapter": 64 * 2**20},
    disk_free=20 * GIB,
    changes=[
        Change({"train.batch_size": 4, "train.gradient_accumulation": 4}, 3 * GIB + GIB // 2, 0, False),
        Change({"quantization.storage": "nf4"}, 2 * GIB, 0, True),
    ],
    notes=["the blocks differ"],
)


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`printed(plan)`: the lines of its tables on a wide terminal, with single spaces and without frames."""
    monkeypatch.setenv("COLUMNS", "200")

    def lines(plan: Estimate) -> list[str]:
        print_estimate(plan)
        words = (line.replace("│", " ").replace("┃", " ").split() for line in capsys.readouterr().out.splitlines())
        return [" ".join(line) for line in words]

    return lines


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.2 s"), (89.9, "89.9 s"), (90, "2 min"), (300, "5 min"), (5399, "90 min"), (5400, "1.5 h")],
)
def test_a_duration_has_the_unit_in_which_people_tell_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_every_figure_of_the_estimate_is_in_a_row_with_its_name(printed: Any) -> None:
    lines = printed(PLAN)
    for line in (
        "LlamaForCausalLM, 32 blocks, 39.98 M trained weights, 150 optimiser steps, "
        "at most 8 × 320 tokens a forward pass",
        "base weights, quantised 3.0 GiB",
        "adapter 256 MiB",
        "peak 4.0 GiB",
        "of which mapped, can be dropped by the system 512 MiB",
        "this machine has 3.0 GiB, 1.0 GiB free now",
        "time: 10 min, 4.00 s an optimiser step",
        "forward and backward 9 min",
        "checkpoints 30.0 s",
        "disk: 64 MiB, 20.0 GiB free",
        "adapter 64 MiB",
        "train.batch_size: 4, train.gradient_accumulation: 4 3.5 GiB, does not fit",
        "quantization.storage: nf4 2.0 GiB",
        "the blocks differ",
    ):
        assert line in lines, (line, lines)
    assert not any(line.startswith("base 0") for line in lines), "what needs no disk has no row"


def test_what_an_estimate_does_not_have_is_left_out(printed: Any) -> None:
    text = "\n".join(printed(replace(PLAN, time={}, changes=[], mapped=0, notes=[])))
    assert not any(word in text for word in ("time:", "alternatives", "mapped", "differ"))


def test_a_peak_while_loading_is_told_as_one(printed: Any) -> None:
    lines = printed(replace(PLAN, peak=5 * GIB, loading_peak=5 * GIB))
    assert "peak, while loading the base 5.0 GiB" in lines
