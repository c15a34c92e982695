"""Each real stage, ended at random moments: it leaves what was there before or its new results, and goes on from there.

Training, killed, ends bit-equal to a run that nothing befell.
"""

import random
import shutil
import signal
from typing import Any

import pytest
from stage_nursery import Nursery, said

from flows.paths import Paths
from peftcore.files import MANIFEST, damaged_files

OUTS = {
    "fetch": ["base"],
    "prepare": ["data"],
    "detect": ["architecture.json"],
    "train": ["adapter", "training"],
    "evaluate": ["evaluation"],
    "merge": ["merged", "merge.json"],
}
ROWS = {
    signal.SIGKILL: "kill -9 of dvc, flow or stage",
    signal.SIGINT: "Ctrl-C",
    signal.SIGTERM: "SIGTERM",
}
STATUS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 143}
TIMES = ("seconds", "tokens_per_second", "peak_memory")
"""Figures that no two runs share, and so files that hold them."""
TIMED = {"training/summary.json", "training/log.jsonl", "evaluation/metrics.json"}


@pytest.fixture
def paths(prepared: Paths, tiny_params: Any) -> Paths:
    """A repository whose base is still to be fetched, and whose stages train sixteen steps."""
    prepared.base.rename(prepared.root / "source")
    given = tiny_params(base={"source": "path:source"}, train={"epochs": 2.0, "evaluations": 8})
    prepared.params.write_text(given.model_dump_json())
    return prepared


def results(paths: Paths, stage: str) -> dict[str, bytes]:
    """What a stage has written, but for files that tell times."""
    found = {}
    for out in OUTS[stage]:
        place = paths.artifacts / out
        files = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
        found |= {file.relative_to(paths.artifacts).as_posix(): file.read_bytes() for file in files}
    return {name: data for name, data in found.items() if name not in TIMED}


def assert_whole(paths: Paths, after: dict[str, bytes], stage: str) -> None:
    """Each out is absent or whole; an adapter's files come one by one, its manifest last."""
    now = results(paths, stage)
    for out in OUTS[stage]:
        found, wanted = ({n: d for n, d in one.items() if n.split("/")[0] == out} for one in (now, after))
        if out == "adapter" and f"adapter/{MANIFEST}" not in found:
            wanted = {name: data for name, data in wanted.items() if name in found}
        assert found in ({}, wanted), f"{out} is half-written"
    for folder in paths.artifacts.iterdir():
        assert not (folder / MANIFEST).exists() or not damaged_files(folder)


@pytest.mark.proof
def test_stages_ended_at_random_moments(nursery: Nursery, paths: Paths, fault: Any, rounds: int) -> None:
    moments = random.Random(0)
    for stage in OUTS:
        status, seconds = nursery.run(paths.root, stage)
        assert status == 0, said(paths.root)
        _, seconds = nursery.run(paths.root, stage)  # the first has imported something late, perhaps
        whole = results(paths, stage)
        for number, row in list(ROWS.items()) * rounds:
            if stage == "train" and number == signal.SIGKILL:
                row = "kill -9 of training"
            with fault(row):
                _clear(paths, stage)
                hidden = _hidden(paths)
                ended = nursery.end(paths.root, stage, number, moments.uniform(0, seconds))
                assert ended in (STATUS[number], 0), f"{stage}, {number}: {ended} {said(paths.root)}"
                assert_whole(paths, whole, stage)
                if number != signal.SIGKILL:
                    assert _hidden(paths) == hidden, "a temporary file is left"
                assert nursery.run(paths.root, stage)[0] == 0, said(paths.root)
                assert results(paths, stage) == whole


def _hidden(paths: Paths) -> set[str]:
    """Temporary files; a kill leaves some, which nobody takes for results."""
    return {one.name for one in paths.artifacts.iterdir() if one.name.startswith(".")}


def _clear(paths: Paths, stage: str) -> None:
    """As DVC does before a stage starts."""
    for out in OUTS[stage]:
        place = paths.artifacts / out
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
