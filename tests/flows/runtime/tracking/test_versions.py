"""What happens to a version later is mirrored to the backends that have its training."""

import json
import logging
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb

from flows.params import Params
from flows.paths import Paths
from flows.runtime.tracking import mirror_judgement, mirror_promotion
from flows.runtime.tracking import versions as module
from flows.runtime.tracking.versions import tracked_runs

RECORD: dict[str, Any] = {
    "name": "docs",
    "version": "v0.1.1",
    "wandb_run_id": "t1",
    "adapter": {"content": "ab" * 32},
    "params": {},
}


def params_of(**tracking: Any) -> Params:
    return Params.model_validate({"tracking": tracking})


class Run:
    """A run of W&B at a server, and what it linked."""

    id = "p1"

    def __init__(self) -> None:
        self.linked: list[tuple[Any, str, list[str]]] = []
        self.finished: list[int] = []

    def link_artifact(self, artifact: Any, target_path: str, aliases: list[str]) -> None:
        self.linked.append((artifact, target_path, aliases))

    def finish(self, exit_code: int) -> None:
        self.finished.append(exit_code)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    seen = SimpleNamespace(given=[], run=Run())

    def init(**given: Any) -> Run:
        seen.given.append(given)
        return seen.run

    monkeypatch.setattr(wandb, "init", init)
    return seen


@pytest.fixture
def adapter(tmp_path: Path) -> Any:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")

    @contextmanager
    def give() -> Any:
        yield tmp_path

    return give


def test_the_runs_of_a_record_and_of_an_older_one() -> None:
    assert tracked_runs({"wandb_run_id": None}) == {} and tracked_runs({}) == {}
    assert tracked_runs({"wandb_run_id": "a", "tracking_runs": {"mlflow": "b"}}) == {"wandb": "a", "mlflow": "b"}


def test_a_promotion_is_linked_into_the_registry_of_a_server(opened: Any, adapter: Any, tmp_path: Path) -> None:
    mirror_promotion(params_of(mode="online", wandb_registry="model"), tmp_path, RECORD, adapter)
    ((artifact, target, aliases),) = opened.run.linked
    assert (target, aliases) == ("wandb-registry-model/docs", ["champion", "v0.1.1"])
    assert (artifact.name, artifact.type) == (
        "docs",
        "model",
    ) and "adapter_model.safetensors" in artifact.manifest.entries
    assert artifact.metadata == {"version": "v0.1.1", "tag": "docs@v0.1.1", "adapter_sha256": "ab" * 32}
    (given,) = opened.given
    assert (given["job_type"], given["group"], given["mode"]) == ("promote", "t1", "online")
    assert opened.run.finished == [0]


@pytest.mark.parametrize(
    ("tracking", "record"),
    [
        ({"mode": "online"}, RECORD),
        ({"mode": "offline"}, RECORD),
        ({"mode": "disabled", "wandb_registry": "model"}, RECORD),
        ({"mode": "online", "wandb_registry": "model"}, {**RECORD, "wandb_run_id": None}),
    ],
)
def test_nothing_is_linked_without_a_registry_a_server_or_a_tracked_training(
    opened: Any, tmp_path: Path, tracking: dict[str, Any], record: dict[str, Any]
) -> None:
    mirror_promotion(params_of(**tracking), tmp_path, record, lambda: pytest.fail("nothing is uploaded"))
    assert opened.given == []


def test_a_link_that_fails_is_a_warning(
    opened: Any, adapter: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no such registry")

    monkeypatch.setattr(opened.run, "link_artifact", refuse)
    with caplog.at_level(logging.WARNING):
        mirror_promotion(params_of(mode="online", wandb_registry="model"), tmp_path, RECORD, adapter)
    assert "no such registry; the promotion is done, and no link is made" in caplog.text
    assert opened.run.finished == [1]


def test_an_alias_that_cannot_be_set_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise LookupError("no such model")

    monkeypatch.setattr(module, "set_alias", refuse)
    record = {**RECORD, "tracking_runs": {"mlflow": "m1"}}
    mirror_promotion(params_of(backends=["mlflow"]), tmp_path, record, lambda: pytest.fail("nothing is uploaded"))
    assert "MLflow: no such model; the promotion is done, and the alias champion is not set" in caplog.text


def test_the_judges_figures_and_verdicts_are_mirrored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables: dict[str, list[Any]] = {}
    summaries: list[Any] = []

    class Recorder:
        def __init__(self, *_: Any) -> None:
            return

        def table(self, name: str, rows: Any) -> None:
            tables[name] = list(rows)

        def finish(self, summary: Any) -> None:
            summaries.append(summary)

        def close(self) -> None:
            return

    monkeypatch.setattr(module, "Tracker", Recorder)
    paths = Paths(tmp_path)
    paths.judgement.parent.mkdir(parents=True)
    texts = {key: key for key in ("id", "prompt", "reference", "candidate", "champion")}
    replies = [{"choice": "first", "text": ""}, {"choice": "second", "text": ""}]
    rows = [texts | {"outcome": "won", "replies": replies}, texts | {"outcome": "equal", "replies": []}]
    paths.judgement.write_text(json.dumps({"rows": rows}))
    mirror_judgement(params_of(), paths, RECORD, {"won": 1})
    assert summaries == [{"judge": {"won": 1}}]
    assert [(row["candidate_first"], row["champion_first"]) for row in tables["judge_verdicts"]] == [
        ("first", "second"),
        (None, None),
    ]
    paths.judgement.unlink()
    mirror_judgement(params_of(), paths, RECORD, {"won": 1})
    assert "the judge's verdicts are not mirrored" in caplog.text and len(summaries) == 1
    mirror_judgement(params_of(), paths, {**RECORD, "wandb_run_id": None}, {"won": 1})
    assert len(summaries) == 1, "the version has no tracked run"
