"""The command `peftcore serve`: a real process, and promotions that it picks up while it runs."""

import copy
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from flows.cli import app
from flows.errors import BaseModelError, RegistryError
from flows.gate.promote import promote
from flows.params import Quantization
from flows.registry.registry import Registry
from flows.runtime.project import dvc
from flows.serving.serve import ServedBase, StageWatch, compositions, register_adapters
from peftcore import LoraConfig, get_peft_model
from peftcore.errors import CheckpointError, ConfigError
from peftcore.routing import AdapterStore


@pytest.fixture(autouse=True)
def loggers_as_before() -> Iterator[None]:
    """The command lets its packages say more."""
    loggers = [logging.getLogger(name) for name in ("flows", "peftcore")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


TINY: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                        "num_key_value_heads": 1, "vocab_size": 32}  # fmt: skip


class FakeStore:
    """What has been asked of a store: (verb, name, the version's folder name), and the files' weights."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.weights: list[bytes] = []

    def swap(self, name: str, directory: Path, tags: Any, check: Any) -> None:
        self.asked.append(("swap", name, directory.name))
        self.weights.append((directory / "adapter_model.safetensors").read_bytes())

    def remove(self, name: str) -> None:
        self.asked.append(("remove", name))


def _small() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8))


def test_adapters_of_a_remote_are_pulled_when_one_is_asked_for(tmp_path: Path) -> None:
    root, remote, folder = tmp_path / "repository", tmp_path / "remote", tmp_path / "repository" / "adapters"
    folder.mkdir(parents=True)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    dvc(root, "init", "--quiet")
    dvc(root, "remote", "add", "--quiet", "--default", "here", str(remote))
    model = _small()
    for number, name in enumerate(("here", "sql", "chat", "lost")):
        own = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["0"]))
        torch.nn.init.constant_(own[0].adapters["default"].lora_B, 1.0 + number)
        own.save_pretrained(folder / name)
        if name != "here":
            dvc(root, "add", "--quiet", f"adapters/{name}")
    dvc(root, "push", "--quiet", "adapters/sql.dvc", "adapters/chat.dvc")
    shutil.rmtree(root / ".dvc" / "cache")
    for name in ("sql", "chat", "lost"):
        shutil.rmtree(folder / name)
    model = get_peft_model(model, LoraConfig(r=1, target_modules=["0"])).eval()
    store = AdapterStore(model)
    assert register_adapters(store, folder) == ["here", "chat", "lost", "sql"]
    assert not (folder / "sql").exists()
    x = torch.ones(1, 8)
    with store.route(["sql"]):
        found = model(x)
    assert (folder / "sql" / "adapter_config.json").is_file() and not (folder / "chat").exists()
    with store.route(["here"]):
        assert not torch.equal(model(x), found)
    with pytest.raises(CheckpointError, match=r"lost\.dvc.*dvc push"):
        store.acquire("lost")
    assert store.statistics()["failures"] == 1 and store.acquire("chat").name
    with pytest.raises(ConfigError, match="holds no adapters"):
        register_adapters(store, remote)


@pytest.fixture
def base(project: Any) -> ServedBase:
    """The base on which the project's versions are evaluated."""
    return ServedBase(
        json.loads(project.paths.evaluation_metrics.read_text())["base_model"], project.params.quantization
    )


@pytest.fixture
def followed(project: Any, base: ServedBase, tmp_path: Path) -> tuple[StageWatch, FakeStore]:
    store = FakeStore()
    return StageWatch(project.paths, "docstrings", "champion", store, base, tmp_path / "kept", 0.05), store  # type: ignore[arg-type]


def test_each_promoted_version_takes_the_place_of_the_one_before(project: Any, followed: Any) -> None:
    watch, store = followed
    assert not watch.check()  # nothing is promoted yet
    project.register()
    assert not watch.check()  # a version without the stage is none
    promote(project.params, project.paths)
    assert watch.check() and not watch.check()
    assert store.asked == [("swap", "docstrings", "v0.1.0")]

    project.register(loss=2.0, weight=2.0)
    promote(project.params, project.paths)
    with watch.running():
        until = time.monotonic() + 60
        while watch.version == "v0.1.0" and time.monotonic() < until:
            time.sleep(0.05)
    assert store.asked[1:] == [("swap", "docstrings", "v0.1.1")]
    assert store.weights[1] == (project.paths.adapter / "adapter_model.safetensors").read_bytes() != store.weights[0]


def test_a_version_that_loses_the_stage_is_served_no_longer(project: Any, followed: Any) -> None:
    watch, store = followed
    project.register()
    promote(project.params, project.paths)
    assert watch.check()
    subprocess.run(
        [str(Path(sys.executable).with_name("gto")), "deprecate", "docstrings", "v0.1.0", "champion"],
        cwd=project.root,
        check=True,
    )
    assert watch.check() and not watch.check()
    assert store.asked[-1] == ("remove", "docstrings") and watch.version is None


def test_another_version_under_the_same_number_takes_the_place_too(project: Any, followed: Any) -> None:
    """As after a fetch, where the remote has given the number to another version."""
    watch, store = followed
    project.register()
    promote(project.params, project.paths)
    assert watch.check()
    project.git("tag", "--delete", "docstrings@v0.1.0", "docstrings#champion#1")
    project.register(weight=2.0)
    promote(project.params, project.paths)
    assert watch.check() and not watch.check() and watch.version == "v0.1.0"
    assert store.weights[1] == (project.paths.adapter / "adapter_model.safetensors").read_bytes() != store.weights[0]


@pytest.mark.parametrize("quantization", [{}, {"quantization": {"storage": "of another release"}}])
def test_a_record_of_another_storage_is_a_warning_and_the_watch_goes_on(
    project: Any, followed: Any, monkeypatch: pytest.MonkeyPatch, quantization: dict[str, Any]
) -> None:
    watch, store = followed
    record = project.register()
    promote(project.params, project.paths)
    params = {key: value for key, value in record["params"].items() if key != "quantization"} | quantization
    monkeypatch.setattr(Registry, "record", lambda *_: record | {"params": params})
    watch.look()
    assert "does not tell how its base was stored" in watch.warnings["champion"] and store.asked == []


@pytest.mark.parametrize(
    "other",
    [
        {"digest": "0" * 64},
        {"quantization": Quantization(storage="int8")},
        {"quantization": Quantization(double_quant=False)},
    ],
    ids=["files", "storage", "double quantisation"],
)
def test_a_version_evaluated_on_another_base_is_not_served(
    project: Any, base: ServedBase, tmp_path: Path, caplog: pytest.LogCaptureFixture, other: dict[str, Any]
) -> None:
    store: Any = FakeStore()
    watch = StageWatch(project.paths, "docstrings", "champion", store, replace(base, **other), tmp_path)
    project.register()
    promote(project.params, project.paths)
    with pytest.raises(BaseModelError, match=r"was evaluated on base .* and this server has loaded base .* start the"):
        watch.check()
    for _ in range(2):
        watch.look()
    assert store.asked == [] and watch.version is None
    assert "start the server again" in watch.warnings["champion"]
    assert sum(record.name == "flows.serving.serve" for record in caplog.records) == 1, "it is said once"


def test_a_version_that_does_not_load_leaves_the_old_one(project: Any, base: ServedBase, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY))
    store = AdapterStore(model)
    watch = StageWatch(project.paths, "docstrings", "champion", store, base, tmp_path / "kept")
    own = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    own.save_pretrained(tmp_path / "own")
    store.register("docstrings", tmp_path / "own")
    watch.version = "v0.0.9"
    project.register()  # its adapter is of another model
    promote(project.params, project.paths)
    watch.look()
    assert watch.version == "v0.0.9" and watch.warnings["champion"]
    with store.using("docstrings") as names:
        assert list(names) == ["docstrings"]


def test_a_version_whose_files_are_damaged_is_not_served(project: Any, followed: Any) -> None:
    watch, store = followed
    project.register()
    promote(project.params, project.paths)
    for path in (project.root / ".dvc" / "cache").rglob("*"):
        if path.is_file() and path.read_bytes() == (project.paths.adapter / "adapter_config.json").read_bytes():
            path.chmod(0o644)
            path.write_text('{"peft_type": "LORA" }')
    with pytest.raises(RegistryError, match=r"adapter_config.json of docstrings@v0.1.0 is not what was registered"):
        watch.check()
    assert store.asked == [] and watch.version is None


@pytest.mark.parametrize("text", ["mix", '={"a": 1}', 'mix={"a": "b"}', "mix=[1]", "mix={}", 'mix={"a": true}'])
def test_a_composition_that_is_none_is_shown_how(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape('give NAME={"adapter": weight, ...}')):
        compositions([text])


def test_a_composition_is_a_weighted_sum() -> None:
    (one,) = compositions(['mix={"sql": 0.7, "chat": -1}']).values()
    assert [(term.name, term.weight) for term in one.terms()] == [("sql", 0.7), ("chat", -1.0)]


# -- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def adapters(tiny_base: Path, tmp_path: Path) -> Path:
    """A folder with adapters sql and chat."""
    for seed, name in enumerate(("sql", "chat")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(tiny_base)
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(tmp_path / "adapters" / name)
    return tmp_path / "adapters"


@pytest.fixture
def started(tiny_base: Path, adapters: Path) -> Iterator[Callable[..., tuple[Any, str]]]:
    """Start `peftcore serve` with more options; gives the process and its address."""
    made = []

    def start(*options: str, **environment: str) -> tuple[Any, str]:
        command = [sys.executable, "-c", "from flows.cli import app; app()", "serve", "--port", "0"]
        given = ["--base", str(tiny_base), "--adapters", str(adapters), *options]
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


def test_a_process_serves_and_ends_in_order(started: Callable[..., tuple[Any, str]]) -> None:
    mix = 'mix={"sql": 0.5, "chat": 0.5}'
    process, url = started("--name", "tiny", "--composition", mix, PEFTCORE_API_KEYS="one,two")
    with httpx.Client(base_url=url, headers={"authorization": "Bearer two"}, timeout=30) as client:
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
    assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--composition", 'mix={"sql": 1, "nope": 1}'], "--composition mix: no adapter 'nope'; there is: chat, sql"),
        (["--composition", 'sql={"chat": 1}'], "the composition 'sql' has the name of the base or of an adapter"),
        (["--host", "203.0.113.1"], "cannot listen on 203.0.113.1 port 8000"),
        (["--watch"], "no pipeline in"),
        (["--api-key", ""], "an API key is empty; is the variable that it is read from set?"),
    ],
)
def test_what_cannot_be_served_is_one_message(
    tiny_base: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    monkeypatch.chdir(adapters)
    result = CliRunner().invoke(app, ["serve", "--base", str(tiny_base), "--adapters", str(adapters), *options])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: ") and said in result.stderr


def test_folders_without_a_model_or_adapters_are_named(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    empty = str(tmp_path / "empty")
    for options, said in (
        (["--base", empty], "holds no base model that can be served"),
        (["--base", str(tiny_base), "--adapters", empty], "holds no adapters"),
    ):
        result = CliRunner().invoke(app, ["serve", *options])
        assert (result.exit_code, said in result.stderr) == (1, True), result.stderr


def test_the_command_has_help() -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["serve", "--help"])
    assert result.exit_code == 0 and "PEFTCORE_API_KEYS" in result.stdout


def test_a_version_promoted_elsewhere_is_fetched_and_a_failing_fetch_is_a_warning(
    project: Any, base: ServedBase, tmp_path: Path
) -> None:
    """Another machine promotes and pushes; this one has only a clone of the repository."""
    store: Any = FakeStore()
    remote = tmp_path / "remote.git"
    project.register()
    project.git("clone", "--quiet", "--bare", str(project.root), str(remote))
    project.git("remote", "add", "shared", str(remote))
    promote(project.params, project.paths, push_to="shared")
    project.git("tag", "--delete", "docstrings#champion#1")  # as in a clone from before the promotion

    folder = tmp_path / "kept"
    alone = StageWatch(project.paths, "docstrings", "champion", store, base, folder)
    alone.look()
    assert alone.version is None and alone.warnings == {}
    watch = StageWatch(project.paths, "docstrings", "champion", store, base, folder, remote="shared")
    watch.look()
    assert (watch.version, watch.warnings) == ("v0.1.0", {})

    remote.rename(tmp_path / "away.git")
    watch.look()
    assert watch.version == "v0.1.0" and "a newer version may be there" in watch.warnings["fetch"]
    (tmp_path / "away.git").rename(remote)
    watch.look()
    assert watch.warnings == {}
