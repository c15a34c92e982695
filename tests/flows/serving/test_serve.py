"""The command `peftcore serve`, in a real process."""

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from flows.cli import app
from flows.serving.serve import _chat_template, _check_is_free
from peftcore import ConfigError, LoraConfig, get_peft_model
from peftcore.serving import Records


@pytest.fixture(autouse=True)
def loggers_as_before() -> Iterator[None]:
    """The command lets its packages say more."""
    loggers = [logging.getLogger(name) for name in ("flows", "peftcore")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, write_tiny_base: Callable[[Path], Path]) -> Path:
    """A base that no test changes."""
    return write_tiny_base(tmp_path_factory.mktemp("served") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path) -> Path:
    """A folder with adapters sql and chat, which no test changes."""
    for seed, name in enumerate(("sql", "chat")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base)
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(base.with_name("adapters") / name)
    return base.with_name("adapters")


@pytest.fixture
def started(base: Path, adapters: Path) -> Iterator[Callable[..., tuple[Any, str]]]:
    """Start `peftcore serve` with more options; gives the process and its address."""
    made = []

    def start(*options: str, **environment: str) -> tuple[Any, str]:
        command = [sys.executable, "-c", "from flows.cli import app; app()", "serve", "--port", "0"]
        given = ["--base", str(base), "--adapters", str(adapters), *options]
        process = subprocess.Popen(
            [*command, *given], env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True
        )
        made.append(process)
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"serving (.*) on (http://\S+)", line):
                return process, found.group(2)
        raise AssertionError("it did not start")

    yield start
    for process in made:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.slow
def test_a_process_serves_and_ends_in_order(started: Callable[..., tuple[Any, str]]) -> None:
    mix = 'mix={"sql": 0.5, "chat": 0.5}'
    options = ("--name", "tiny", "--composition", mix, "--grace", "300")  # for the answer, on a busy machine
    process, url = started(*options, PEFTCORE_API_KEYS="one,two")
    with httpx.Client(base_url=url, headers={"authorization": "Bearer two"}, timeout=300) as client:
        names = [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert names == ["tiny", "chat", "sql", "mix"]
        for name in names:
            reply = client.post("/v1/completions", json={"model": name, "prompt": "def", "max_tokens": 4})
            assert reply.json()["usage"]["prompt_tokens"] == 3
        assert client.get("/v1/models", headers={"authorization": "Bearer three"}).status_code == 401
        given = {"model": "sql", "prompt": "def", "max_tokens": 200, "temperature": 0, "stream": True}
        with client.stream("POST", "/v1/completions", json=given) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
    assert process.wait(300) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--composition", 'mix={"sql": 1, "nope": 1}'], "--composition mix: no adapter 'nope'; there is: chat, sql"),
        (["--composition", 'sql={"chat": 1}'], "the composition 'sql' has the name of the base model or of an adapter"),
        (["--host", "203.0.113.1"], "cannot listen on 203.0.113.1 port 8000"),
        (["--watch"], "no pipeline in"),
        (["--adapter-dtype", "int8"], "--adapter-dtype 'int8' is unknown; give auto or float32"),
        (["--api-key", ""], "an API key is empty; check that its environment variable is set"),
        (["--record", "r", "--redact", "sql/bad.yaml"], "sql/bad.yaml, rule 1: the pattern 'T-(' "),
    ],
)
def test_what_cannot_be_served_is_one_message(
    base: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    monkeypatch.chdir(adapters)
    (adapters / "sql" / "bad.yaml").write_text("- {pattern: 'T-('}\n")
    result = CliRunner().invoke(app, ["serve", "--base", str(base), "--adapters", str(adapters), *options])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: ") and said in result.stderr


@pytest.mark.slow
def test_what_a_killed_server_has_accepted_is_there_for_the_next_one(
    started: Callable[..., tuple[Any, str]], tmp_path: Path
) -> None:
    (tmp_path / "redact.yaml").write_text("- email\n")
    options = ("--name", "tiny", "--record", str(tmp_path / "r"), "--redact", str(tmp_path / "redact.yaml"))
    process, url = started(*options)
    body = {"model": "sql", "messages": [{"role": "user", "content": "I am ada@example.org"}], "max_tokens": 4}
    rated = []
    for number in range(5):
        identity = httpx.post(f"{url}/v1/chat/completions", json=body | {"stream": False}, timeout=60).json()["id"]
        rating = {"id": identity, "rating": number / 4}
        assert httpx.post(f"{url}/v1/feedback", json=rating, timeout=60).status_code == 200
        rated.append(identity)
    process.kill()
    process.wait()
    records = list(Records(tmp_path / "r"))
    assert [one["id"] for one in records if one["kind"] == "rating"] == rated
    assert {one["messages"][0]["content"] for one in records if one["kind"] == "answer"} == {"I am <email>"}
    process, url = started(*options)
    assert httpx.post(f"{url}/v1/feedback", json={"id": rated[0], "rating": "up"}, timeout=60).status_code == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert len(list(Records(tmp_path / "r"))) == 11 and not list((tmp_path / "r").glob("*.part"))


def test_another_model_may_not_have_the_name_of_the_watched_project() -> None:
    with pytest.raises(ConfigError, match="--watch serves the promoted version as 'tickets', and another model has"):
        _check_is_free("tickets", ["base", "tickets"])
    _check_is_free("tickets", ["base", "mix"])


def test_folders_without_a_model_or_adapters_are_named(base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    empty = str(tmp_path / "empty")
    for options, said in (
        (["--base", empty], "contains no base model that can be served"),
        (["--base", str(base), "--adapters", empty], "holds no adapters"),
        (["--base", empty, "--adapters", empty], "holds no adapters"),  # before the base is loaded
    ):
        result = CliRunner().invoke(app, ["serve", *options])
        assert (result.exit_code, said in result.stderr) == (1, True), result.stderr


def test_the_command_has_help() -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["serve", "--help"])
    assert result.exit_code == 0 and "PEFTCORE_API_KEYS" in result.stdout


def test_a_chat_template_that_cannot_be_read_is_refused_before_the_base_is_loaded(tmp_path: Path) -> None:
    for text, said in (("{% if %}", "give a file with a Jinja chat template"), (" \n", "the file is empty")):
        (tmp_path / "template.jinja").write_text(text)
        with pytest.raises(ConfigError, match=said):
            _chat_template(tmp_path / "template.jinja")
    (tmp_path / "template.jinja").write_text("{{ messages[0].content }}")
    assert _chat_template(tmp_path / "template.jinja") == "{{ messages[0].content }}"
