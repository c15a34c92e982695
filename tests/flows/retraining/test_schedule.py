"""`peftcore schedule` as a process: a server of its own, the deployment's schedule, a run of it, an orderly end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import psutil
import pytest

from flows.errors import BusyError, ParamsError, StageError
from flows.retraining import schedule
from flows.retraining.history import entries
from flows.retraining.schedule import serve

LIMIT = 150
"""Seconds; Prefect's first start migrates a database."""


def wait_for(what: Any, process: subprocess.Popen[bytes], log: Path) -> Any:
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        if found := what():
            return found
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)
    raise AssertionError(log.read_text())


SAVE_BLOCK = """
import sys
from prefect.blocks.notifications import CustomWebhookNotificationBlock
block = CustomWebhookNotificationBlock(name="hook", url=sys.argv[1], method="POST", json_data={"text": "{{subject}}"})
block.save("hook")
"""


@pytest.fixture
def hook() -> Iterator[tuple[str, list[str]]]:
    """The address of a web hook, and what has been posted to it."""
    posted: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", posted
        server.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_scheduled_retraining_runs_is_told_of_and_ends_in_order(
    weekly: Any, hook: tuple[str, list[str]], tmp_path: Path
) -> None:
    """The schedule's own minute is not waited for: a run of the deployment is asked for, as the clock would."""
    text = weekly.paths.params.read_text().replace("retry_delay", "notify: [custom-webhook/hook], retry_delay")
    weekly.paths.params.write_text(text)
    weekly.git("commit", "--quiet", "--all", "--message=Notify")
    (weekly.incoming / "week1.jsonl").write_text("first\\n")
    log = tmp_path / "schedule.log"
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect")}
    command = [sys.executable, "-m", "flows.cli", "schedule", "--cron", "0 3 * * 1", "--timezone", "Europe/Berlin"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=weekly.root, env=environment, stdout=output, stderr=output)
    try:
        note = wait_for(
            lambda: weekly.paths.schedule.exists() and json.loads(weekly.paths.schedule.read_text()), process, log
        )
        assert (note["cron"], note["timezone"], note["pid"]) == ("0 3 * * 1", "Europe/Berlin", process.pid)
        here = environment | {"PREFECT_API_URL": note["server"]}

        def deployment() -> dict[str, Any] | None:
            told = httpx.get(f"{note['server']}/deployments/name/retrain/scheduled", timeout=30)
            return told.json() if told.is_success else None

        subprocess.run([sys.executable, "-c", SAVE_BLOCK, hook[0]], env=here, capture_output=True, check=True)
        deployed = wait_for(deployment, process, log)
        assert deployed["schedules"][0]["schedule"]["cron"] == "0 3 * * 1"
        children = [" ".join(child.cmdline()) for child in psutil.Process(process.pid).children()]
        assert ["prefect server start" in child for child in children if "server" in child] == [True], "one server"
        # Prefect's own command asks again while the server's database is busy (503)
        ask = [sys.executable, "-m", "prefect", "deployment", "run", "retrain/scheduled"]
        subprocess.run(ask, env=here, capture_output=True, check=True)
        told = wait_for(lambda: entries(weekly.paths), process, log)
        assert (told[0].outcome, told[0].version) == ("promoted", "v0.1.0")
        assert wait_for(lambda: hook[1], process, log) == ["docstrings: retraining promoted"]
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
    text = log.read_text()
    assert status == 0, text
    assert "at the times '0 3 * * 1' (Europe/Berlin), next 20" in text, "also without a terminal"
    assert "retraining promoted: docstrings v0.1.0 is champion" in text
    assert not weekly.paths.schedule.exists()
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{note['server']}/health", timeout=5)


@pytest.mark.parametrize(
    ("cron", "zone"),
    [
        ("every monday", "UTC"),
        ("0 3 * * 1", "Mars/Olympus"),
        ("@daily", "UTC"),
        ("0 3 31 2 *", "UTC"),
        ("0 3 * * 1", ""),
    ],
)
def test_a_schedule_that_is_none_is_said(project: Any, cron: str, zone: str) -> None:
    with pytest.raises(ParamsError, match="give five fields"):
        serve(project.paths, cron, zone, None)


def test_a_second_schedule_of_a_project_is_refused(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setattr(schedule, "SECONDS_BETWEEN_DELIVERIES", 3600.0)
    monkeypatch.setattr(schedule.signal, "signal", lambda *_: None)
    project.paths.schedule.parent.mkdir(parents=True, exist_ok=True)
    project.paths.schedule.write_text("the first one's")
    with schedule._only_one(project.paths), pytest.raises(BusyError, match=r"a schedule of .* runs already"):
        serve(project.paths, "0 3 * * 1", "UTC", None)
    assert project.paths.schedule.read_text() == "the first one's"


def test_a_server_that_ends_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(schedule, "SECONDS_BETWEEN_STARTS", 0.0)
    log = tmp_path / "server.log"
    server = schedule._Server(["sleep", "300"], log)
    watcher = Thread(target=server.watch, daemon=True)
    watcher.start()
    first = server.process
    assert os.getsid(first.pid) != os.getsid(0), "a signal to the process group of the schedule does not end it"
    first.kill()
    until = time.monotonic() + LIMIT
    while server.process is first and time.monotonic() < until:
        time.sleep(0.05)
    assert server.process is not first and server.process.poll() is None
    assert "ended with status -9; it is started again" in caplog.text
    server.stop()
    watcher.join(10)
    assert not watcher.is_alive() and server.process.poll() is not None


def test_a_schedule_whose_server_does_not_start_is_announced(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    announced = []
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(schedule, "SECONDS_TO_START", 0.0)
    monkeypatch.setattr(schedule, "SECONDS_BETWEEN_DELIVERIES", 3600.0)
    monkeypatch.setattr(schedule.signal, "signal", lambda *_: None)
    monkeypatch.setattr(schedule, "try_to_announce", lambda params, root, event: announced.append(event))
    with pytest.raises(StageError, match="did not start within 0 seconds"):
        schedule.serve(project.paths, "0 3 * * 1", "UTC", None)
    (event,) = announced
    assert event.type == "failure" and "did not start" in event.data["reason"]
