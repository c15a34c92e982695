"""Drift on a tiny model: shuffled answers and other words are told apart from more of the same."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.params import Drift
from flows.paths import Paths
from flows.retraining import measure
from flows.retraining.drift import _passed


def row(number: int, answer: int) -> dict[str, str]:
    return {"prompt": f"How much is {number} and 1?", "completion": f"{answer}.", "book": f"book{number // 4}"}


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))


@pytest.fixture
def found(trained: Paths, tiny_params: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    folder = trained.root / "rows"
    folder.mkdir()
    write(folder / "older.jsonl", [row(n, n + 1) for n in range(100)])
    write(folder / "more.jsonl", [row(n, n + 1) for n in range(100, 130)])
    write(folder / "shuffled.jsonl", [row(n, (n * 37) % 97 + 500) for n in range(100, 130)])
    names = [
        row(n, n) | {"prompt": f"Please tell me about the colour of horse number {n} in the field"} for n in range(30)
    ]
    write(folder / "other.jsonl", names)
    request = {"fresh": ["more.jsonl", "shuffled.jsonl", "other.jsonl"], "rows": 20, "adapter": str(trained.adapter)}
    asked, out = trained.root / "request.json", trained.root / "drift.json"
    asked.write_text(json.dumps(request | {"out": str(out)}))
    monkeypatch.setattr(sys, "argv", ["measure", str(asked)])
    measure.run(tiny_params(data={"source": "rows"}), trained)
    return json.loads(out.read_text())


def test_each_kind_of_change_shows_in_its_own_figure(found: dict[str, Any]) -> None:
    assert found["older"]["rows"] == 100
    more, shuffled, other = (found["files"][f"{name}.jsonl"] for name in ("more", "shuffled", "other"))
    assert more["measured_rows"] == 20
    assert shuffled["loss"] > more["loss"]
    assert other["divergence"] > more["divergence"] + 0.2
    assert other["unseen_words"] > 0.25 > 2 * more["unseen_words"]
    assert other["length_p"] < 1e-6 < 0.01
    assert other["length"]["median"] > more["length"]["median"]
    assert found["files"]["more.jsonl"]["loss_error"] > 0


def test_limits_are_passed_beyond_what_chance_allows() -> None:
    rule = Drift(max_loss_gap=1.0, max_divergence=0.5)
    assert _passed({"loss": 3.9, "loss_error": 0.1}, rule, 2.5) == (
        "the champion's loss is +1.40 nats above its test loss, at most 1"
    )
    assert _passed({"loss": 3.9, "loss_error": 0.3}, rule, 2.5) is None, "so few rows may be that far off by chance"
    assert _passed({"divergence": 0.6}, rule, None) == "its words diverge by 0.60, at most 0.5"
    assert _passed({"loss": 9.0, "loss_error": 0.1}, Drift(max_loss_gap=None), 2.5) is None
