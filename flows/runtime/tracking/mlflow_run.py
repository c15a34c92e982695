"""A run at an MLflow server or in an MLflow database, and the registered model of a version.

The evaluation is part of the training's run. A version becomes a version of the registered model of its name: an MLflow
model (pyfunc) with the adapter, a signature and the version as tags. A promotion sets the alias that the stage names.
"""

import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from flows.params.train import WITHOUT_CHAT
from flows.paths import Paths
from flows.runtime.databases import sqlite_url
from flows.runtime.tracking.flat import flat, numbers
from peftcore.errors import require_extra

ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Defaults: MLflow's own wait minutes for a server that is down. Variables that are set do not change."""
SECONDS = 5.0
"""Seconds between two requests with records of the training log."""
MOST_METRICS, MOST_PARAMS, LONGEST_PARAM = 1000, 100, 6000
"""MLflow's limits: metrics (count) and parameters (count) of a request, characters of a parameter."""
LOADER = "flows.evaluation.mlflow_model"
"""Module that loads the registered model."""
VERSION = "peftcore_version"
"""Tag of a registered model's version: the version in this project's registry."""


class MlflowRun:
    """One run.

    Args:
        uri: Address of the server or the database; None: MLFLOW_TRACKING_URI, or mlflow.db in `directory`.
        project: Name of the experiment, created if it does not exist.
        config: Configuration, logged as parameters.
        directory: The repository.
        continued: Id of a run to continue; None: a new run.
        name: Name of a new run.

    Raises:
        MissingExtraError: MLflow is not installed.
        Exception: MLflow's or the network's error.
    """

    label = "MLflow"

    def __init__(
        self,
        uri: str | None,
        project: str,
        config: Mapping[str, Any],
        directory: Path,
        continued: str | None,
        name: str | None,
    ) -> None:
        self._client = client_of(uri, directory)
        self._base = Paths(directory).base
        self._metrics: list[Any] = []
        self._sent = time.monotonic()
        if continued is not None:
            self.id = continued
            self._client.update_run(continued, status="RUNNING")
            return
        experiment = _experiment(self._client, project, directory)
        run = self._client.create_run(experiment, run_name=name or os.environ.get("DVC_EXP_NAME"))
        self.id = str(run.info.run_id)
        self._log_params(config)

    def log(self, record: Mapping[str, Any]) -> None:
        """Log the numbers of a record; requests are sent every SECONDS at most."""
        self._add({name: value for name, value in record.items() if name != "step"}, record["step"])
        if time.monotonic() - self._sent > SECONDS:
            self._send()

    def picture(self, name: str, pixels: Any, step: int) -> None:
        """Log a picture as an artifact; pixels: (height, width, 3 or 4), uint8."""
        self._client.log_image(self.id, pixels, artifact_file=f"{name}-{step}.png")

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log rows with the same keys as a table."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        self._client.log_table(self.id, {key: [row.get(key) for row in rows] for key in columns}, f"{name}.json")

    def summarise(self, summary: Mapping[str, Any], adapter: Path | None) -> None:
        """Log the results as metrics and tags, and the adapter's files as artifacts."""
        values = flat(summary)
        self._add(values, 0)
        self._send()
        for name, value in values.items():
            if isinstance(value, str):
                self._client.set_tag(self.id, name, value)
        if adapter is not None:
            self._client.log_artifacts(self.id, str(adapter), "adapter")

    def register(self, record: Mapping[str, Any], commit: str, adapter: Path) -> None:
        """Make the version a version of the registered model; for chats with a model that MLflow can load.

        Args:
            record: The version's record.
            commit: Commit of the version's tag.
            adapter: The adapter's folder.
        """
        name = record["name"]
        is_chat = record["params"]["train"]["objective"] not in WITHOUT_CHAT
        if is_chat:
            self._log_model(record["params"], adapter)
        if not self._client.search_registered_models(f"name = '{name}'"):
            self._client.create_registered_model(name)
        tags = {
            VERSION: record["version"],
            "git_tag": f"{name}@{record['version']}",
            "git_commit": commit,
            "adapter_sha256": record["adapter"]["content"],
        }
        # without a model, the version is the adapter that `summarise` logs
        source = f"runs:/{self.id}/{'model' if is_chat else 'adapter'}"
        self._client.create_model_version(name, source, self.id, tags)

    def _log_model(self, params: Mapping[str, Any], adapter: Path) -> None:
        pyfunc: Any = import_module("mlflow.pyfunc")
        models: Any = import_module("mlflow.models")
        types: Any = import_module("mlflow.types.schema")
        prompt, answer = (types.Schema([types.ColSpec("string", name)]) for name in ("prompt", "answer"))
        with tempfile.TemporaryDirectory(prefix="peftcore-mlflow-") as folder:
            model = Path(folder) / "model"
            pyfunc.save_model(
                str(model),
                loader_module=LOADER,
                data_path=str(adapter),
                signature=models.ModelSignature(prompt, answer),
                pip_requirements=["peftcore[pipeline]"],
                model_config={
                    "base": str(self._base.resolve()),
                    "quantization": dict(params["quantization"]),
                    "system_prompt": params["data"]["system_prompt"],
                    "max_new_tokens": params["evaluate"]["max_new_tokens"],
                },
            )
            self._client.log_artifacts(self.id, str(model), "model")

    def close(self, failed: bool) -> None:
        """Send what is left, and end the run."""
        self._send()
        self._client.set_terminated(self.id, "FAILED" if failed else "FINISHED")

    def _add(self, values: Mapping[str, Any], step: int) -> None:
        entities: Any = import_module("mlflow.entities")
        now = int(time.time() * 1000)
        self._metrics += [entities.Metric(name, value, now, step) for name, value in numbers(values).items()]

    def _send(self) -> None:
        while self._metrics:
            self._client.log_batch(self.id, metrics=self._metrics[:MOST_METRICS])
            del self._metrics[:MOST_METRICS]
        self._sent = time.monotonic()

    def _log_params(self, config: Mapping[str, Any]) -> None:
        entities: Any = import_module("mlflow.entities")
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in flat(config).items()}
        params = [entities.Param(name, text[:LONGEST_PARAM]) for name, text in texts.items()]
        for first in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(self.id, params=params[first : first + MOST_PARAMS])


def set_alias(uri: str | None, directory: Path, name: str, version: str, alias: str) -> None:
    """Give an alias of a registered model to a version of this project's registry.

    Raises:
        LookupError: MLflow has no such version.
        Exception: MLflow's or the network's error.
    """
    client = client_of(uri, directory)
    versions = client.search_model_versions(f"name = '{name}' and tag.{VERSION} = '{version}'")
    if not versions:
        raise LookupError(f"the registered model {name} has no version with the tag {VERSION} {version}")
    newest = max(versions, key=lambda one: int(one.version))
    client.set_registered_model_alias(name, alias, newest.version)


def client_of(uri: str | None, directory: Path) -> Any:
    """Return MLflow's client. Raises MissingExtraError if MLflow is not installed."""
    require_extra("mlflow", "tracking.backends: mlflow", "mlflow")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    mlflow: Any = import_module("mlflow")
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    address = uri or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_url(directory.resolve() / "mlflow.db")
    return mlflow.MlflowClient(tracking_uri=address, registry_uri=address)


def _experiment(client: Any, name: str, directory: Path) -> str:
    """Return the id of an experiment; a new one in a database has its artifacts in `directory`/mlruns."""
    exceptions: Any = import_module("mlflow.exceptions")
    if (experiment := client.get_experiment_by_name(name)) is not None:
        return experiment.experiment_id
    is_server = client.tracking_uri.startswith(("http://", "https://"))
    location = None if is_server else (directory.resolve() / "mlruns" / name).as_uri()
    try:
        return client.create_experiment(name, artifact_location=location)
    except exceptions.MlflowException:
        if (experiment := client.get_experiment_by_name(name)) is None:
            raise
        return experiment.experiment_id  # another run has created it at the same time
