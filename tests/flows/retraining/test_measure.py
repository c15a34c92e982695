"""Drift on a tiny model: shuffled answers and other words are told apart from more of the same."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.params import Drift, Params
from flows.paths import Paths
from flows.retraining import measure
from flows.retraining.drift import _passed
from flows.stages import prepare, train


def row(number: int, answer: int) -> dict[str, str]:
    return {"prompt": f"How much is {number} and 1?", "completion": f"{answer}.", "book": f"book{number // 4}"}


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """`measured(params, champion, files)`: what the process finds for all files but `older.jsonl`."""

    def run(params: Params, champion: Params | None, files: dict[str, list[dict[str, str]]]) -> dict[str, Any]:
        (tmp_path / "rows").mkdir(exist_ok=True)
        for name, rows in files.items():
            (tmp_path / "rows" / name).write_text("".join(json.dumps(one) + "\n" for one in rows))
        asked, out = tmp_path / "request.json", tmp_path / "drift.json"
        known = champion and {"root": str(tmp_path), "params": champion.model_dump()}
        request = {"new_files": [name for name in files if name != "older.jsonl"], "rows": 20, "champion": known}
        asked.write_text(json.dumps(request | {"out": str(out)}))
        monkeypatch.setattr(sys, "argv", ["measure", str(asked)])
        measure.run(params, Paths(tmp_path))
        return json.loads(out.read_text())

    return run


@pytest.fixture
def found(trained: Paths, tiny_params: Any, measured: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    assert trained.adapter.exists()
    names = [
        row(n, n) | {"prompt": f"Please tell me about the colour of horse number {n} in the field"} for n in range(30)
    ]
    files = {
        "older.jsonl": [row(n, n + 1) for n in range(100)],
        "more.jsonl": [row(n, n + 1) for n in range(100, 130)],
        "shuffled.jsonl": [row(n, (n * 37) % 97 + 500) for n in range(100, 130)],
        "other.jsonl": names,
    }
    return measured(tiny_params(data={"source": "rows"}), tiny_params(), files)


def test_each_kind_of_change_shows_in_its_own_figure(found: dict[str, Any]) -> None:
    assert found["older"]["rows"] == 100
    more, shuffled, other = (found["files"][f"{name}.jsonl"] for name in ("more", "shuffled", "other"))
    assert more["measured_rows"] == 20
    assert shuffled["loss"] > more["loss"]
    assert other["divergence"] > more["divergence"] + 0.2
    assert other["unseen_words"] > 2 * more["unseen_words"]
    assert other["length_p"] < 1e-6 < 0.01
    assert other["length"]["median"] > more["length"]["median"]
    assert found["files"]["more.jsonl"]["loss_error"] > 0


def pair(number: int, wrong: bool = False) -> dict[str, str]:
    sides = {"chosen": f"{number + 1}.", "rejected": "I do not know."}
    if wrong:
        sides = {"chosen": sides["rejected"], "rejected": sides["chosen"]}
    return {"prompt": f"How much is {number} and 1?", "book": f"book{number // 4}"} | sides


def labelled(number: int, wrong: bool = False) -> dict[str, str]:
    names = ("warm", "cold", "wet")
    text, label = names[number % 3], names[(number + wrong) % 3]
    return {"text": f"{text} number {number}", "label": label, "book": f"book{number // 4}"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "kind", "make"),
    [("dpo", "preference", pair), ("orpo", "preference", pair), ("classification", "classification", labelled)],
)
def test_wrong_rows_of_every_kind_show_in_the_champions_loss(
    tmp_path: Path, tiny_base: Path, tiny_params: Any, measured: Any, objective: str, kind: str, make: Any
) -> None:
    paths, data = Paths(tmp_path), {"kind": kind, "near_duplicates": "keep"}
    assert paths.base == tiny_base
    older = [make(n) for n in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in older))
    champion = tiny_params(data=data, train={"objective": objective, "epochs": 3.0})
    prepare.run(champion, paths)
    train.run(champion, paths)
    files = {
        "older.jsonl": older,
        "more.jsonl": [make(n) for n in range(100, 130)],
        "wrong.jsonl": [make(n, wrong=True) for n in range(100, 130)],
    }
    if objective == "classification":  # one is new, and sorts before the others
        files["new.jsonl"] = [make(n) | {"label": "an unknown one"} for n in range(100, 110)]
    params = tiny_params(data=data | {"source": "rows"}, train={"objective": objective})
    found = measured(params, champion, files)["files"]
    more, wrong = found["more.jsonl"], found["wrong.jsonl"]
    assert more["measured_rows"] == wrong["measured_rows"] == 20
    assert wrong["loss"] > more["loss"] + 4 * (more["loss_error"] + wrong["loss_error"])
    if objective == "classification":
        assert "loss" not in found["new.jsonl"], "what the champion has no class for"

    # a champion of another base, or that learned another kind of rows, has no loss here
    assert "loss" not in measured(params, None, files)["files"]["more.jsonl"]
    assert "loss" not in measured(params, tiny_params(), files)["files"]["more.jsonl"]


def test_losses_among_another_number_of_passages_are_not_compared(
    tmp_path: Path, tiny_base: Path, tiny_params: Any, measured: Any
) -> None:
    files = {
        name: [{"query": f"How much is {n} and 1?", "positive": f"{n + 1}."} for n in numbers]
        for name, numbers in (("older.jsonl", range(30)), ("more.jsonl", range(30, 40)))
    }
    data = {"source": "rows", "kind": "retrieval", "group_column": None, "slice_column": None}
    params = tiny_params(data=data, train={"objective": "embedding"})
    found = measured(params, params, files)["files"]["more.jsonl"]
    assert found["rows"] == 10 and "divergence" in found and "loss" not in found


def test_limits_are_passed_beyond_what_chance_allows() -> None:
    rule = Drift(max_loss_gap=1.0, max_divergence=0.5)
    assert _passed({"loss": 3.9, "loss_error": 0.1}, rule, 2.5) == (
        "the champion's loss is +1.40 nats above its test loss, at most 1"
    )
    assert _passed({"loss": 3.9, "loss_error": 0.3}, rule, 2.5) is None, "so few rows may be that far off by chance"
    assert _passed({"divergence": 0.6}, rule, None) == "its words diverge by 0.60, at most 0.5"
    assert _passed({"loss": 9.0, "loss_error": 0.1}, Drift(max_loss_gap=None), 2.5) is None
