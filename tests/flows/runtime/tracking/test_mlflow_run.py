"""MLflow: a real server on SQLite gets runs and models, and a dead one stops nothing."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.params import Params
from flows.paths import Paths
from flows.runtime.tracking import Tracker, mirror_promotion, mirror_version

pytest.importorskip("mlflow", reason="the extra mlflow is not part of the environment")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real MLflow server with an SQLite database."""
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    options = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "files")]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", *options]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "DO_NOT_TRACK": "1"})
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 180
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).read()
            break
        except OSError:
            if process.poll() is not None or time.monotonic() > until:
                pytest.fail((folder / "log").read_text()[-2000:])
            time.sleep(0.5)
    yield url
    process.terminate()
    process.wait(60)


def tracker(uri: str | None, folder: Path, **options: Any) -> Tracker:
    config = {"train": {"learning_rate": 0.5, "max_steps": None}, "evaluate": {"scorers": ["chrf"]}}
    return Tracker("docs", "offline", config, folder, backends=["mlflow"], mlflow_uri=uri, **options)


def client_of(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def adapter_in(folder: Path) -> Path:
    adapter = folder / "artifacts" / "adapter"
    adapter.mkdir(parents=True, exist_ok=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    return adapter


def test_a_run_has_its_parameters_curves_pictures_results_and_adapter(server: str, tmp_path: Path) -> None:
    run = tracker(server, tmp_path, name="first")
    (identity,) = run.run_ids.values()
    for step in range(1, 4):
        run.log({"step": step, "loss": 3.0 - step, "validation_loss": None, "epoch": 0.1 * step})
    run.log({"step": 3, "validation_loss": float("nan")})
    run.picture("ranks", np.zeros((4, 6, 4), np.uint8), 3)
    run.table("samples", [{"prompt": "p", "answer": "a"}])
    run.finish({"steps": 3, "method": "lora"}, adapter_in(tmp_path))
    client = client_of(server)
    stored = client.get_run(identity)
    assert stored.info.status == "FINISHED" and stored.info.run_name == "first"
    assert stored.data.params == {"train.learning_rate": "0.5", "evaluate.scorers": '["chrf"]'}
    assert [(one.step, one.value) for one in client.get_metric_history(identity, "loss")] == [(1, 2), (2, 1), (3, 0)]
    assert stored.data.metrics["steps"] == 3 and stored.data.tags["method"] == "lora"
    paths = {one.path for one in client.list_artifacts(identity)}
    assert {"adapter", "ranks-3.png", "samples.json"} <= paths
    assert [one.path for one in client.list_artifacts(identity, "adapter")] == ["adapter/adapter_model.safetensors"]


def test_a_run_that_failed_is_closed_as_failed(server: str, tmp_path: Path) -> None:
    run = tracker(server, tmp_path)
    (identity,) = run.run_ids.values()
    run.log({"step": 1, "loss": 2.0})
    run.close()
    stored = client_of(server).get_run(identity)
    assert stored.info.status == "FAILED" and stored.data.metrics == {"loss": 2.0}


def record_of(run: str, version: str) -> dict[str, Any]:
    return {
        "name": "docs",
        "version": version,
        "wandb_run_id": None,
        "tracking_runs": {"mlflow": run},
        "params": Params().model_dump(mode="json"),
        "adapter": {"content": "ab" * 32},
        "metrics": {"adapter": {"loss": 2.5}},
    }


def test_a_version_is_a_registered_model_with_a_signature_and_a_promotion_moves_its_alias(
    server: str, tmp_path: Path
) -> None:
    params = Params.model_validate({"tracking": {"backends": ["mlflow"], "mlflow_uri": server, "project": "docs"}})
    paths = Paths(tmp_path)
    paths.evaluation.mkdir(parents=True)
    paths.samples.write_text(json.dumps([{"prompt": "p", "adapter": "a"}]))
    paths.evaluation_metrics.write_text(json.dumps({"slices": {}}))
    adapter_in(tmp_path)
    records = []
    for version in ("v0.1.0", "v0.1.1"):
        run = tracker(server, tmp_path)
        (identity,) = run.run_ids.values()
        run.finish({"steps": 3})
        records.append(record_of(identity, version))
        mirror_version(params, paths, records[-1], "c0ffee", {})
    client = client_of(server)
    stored = client.get_run(records[0]["tracking_runs"]["mlflow"])
    assert stored.info.status == "FINISHED" and stored.data.metrics == {"steps": 3, "adapter.loss": 2.5}
    assert stored.data.tags["registry.commit"] == "c0ffee"

    def champion() -> dict[str, str]:
        return dict(client.get_model_version_by_alias("docs", "champion").tags)

    from mlflow.models import get_model_info

    for record in (*records, records[0]):  # two promotions and a rollback
        mirror_promotion(params, tmp_path, record, lambda: pytest.fail("nothing is uploaded"))
        assert champion() == {
            "peftcore_version": record["version"],
            "git_tag": f"docs@{record['version']}",
            "git_commit": "c0ffee",
            "adapter_sha256": "ab" * 32,
        }
    import mlflow

    mlflow.set_tracking_uri(server)
    signature = get_model_info("models:/docs@champion").signature
    assert signature is not None
    assert signature.inputs.input_names() == ["prompt"] and signature.outputs.input_names() == ["answer"]


def test_without_an_address_runs_are_in_a_database_of_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    run = tracker(None, tmp_path)
    (identity,) = run.run_ids.values()
    run.finish({"steps": 1}, adapter_in(tmp_path))
    assert client_of(f"sqlite:///{tmp_path}/mlflow.db").get_run(identity).info.status == "FINISHED"
    assert list((tmp_path / "mlruns").rglob("adapter_model.safetensors"))


def test_a_dead_server_stops_nothing_and_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    started = time.monotonic()
    run = tracker("http://127.0.0.1:9", tmp_path)
    for step in range(3):
        run.log({"step": step, "loss": 1.0})
    run.finish({"steps": 3}, adapter_in(tmp_path))
    assert run.run_ids == {} and time.monotonic() - started < 60
    assert len([one for one in caplog.messages if one.startswith("MLflow: ")]) == 1


def test_a_server_that_dies_in_the_middle_stops_nothing(
    server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.runtime.tracking.mlflow_run.SECONDS", 0.0)
    run = tracker(server, tmp_path)
    run.log({"step": 1, "loss": 1.0})
    run._runs["mlflow"]._client = client_of("http://127.0.0.1:9")  # type: ignore[attr-defined]
    for step in range(2, 5):
        run.log({"step": step, "loss": 1.0})
    run.finish({"steps": 4})
    assert run.run_ids == {} and len([one for one in caplog.messages if one.startswith("MLflow: ")]) == 1
