"""Weeks of feedback on a tiny model: a real server records, ratings become rows, KTO trains, the gate decides.

Users like answers whose letters are mostly a to m. In the second week a crowd rates the opposite.
"""

import contextlib
import json
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest
from command_line import peftcore
from ruamel.yaml import YAML
from tokenizers import pre_tokenizers

from flows.params import load_params
from flows.paths import Paths
from flows.registry.project_registry import registry_of
from flows.retraining import flow
from flows.retraining.drift import DriftReport
from flows.runtime.project import dvc
from flows.runtime.stage import set_seed
from flows.serving.champion_watcher import ChampionWatcher
from flows.serving.served_base import load_evaluated_base
from flows.stages import fetch
from peftcore.routing import AdapterStore
from peftcore.serving import Recorder, in_own_thread, make_service
from peftcore.serving.server import Server

pytestmark = [pytest.mark.proof, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[3]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SMALL: dict[str, dict[str, Any]] = {
    "data": {"source": "data/rows", "kind": "unpaired_preference", "system_prompt": None, "assignment": "hashed",
             "train_rows": None, "validation_rows": 8, "test_rows": None, "validation_share": 0.1, "test_share": 0.3,
             "near_duplicates": "keep"},
    "method": {"r": 4, "lora_alpha": 8},
    "quantization": {"storage": "none"},
    "train": {"objective": "kto", "batch_size": 8, "gradient_accumulation": 1, "learning_rate": 0.01, "epochs": 4.0,
              "evaluations": 1},
    "evaluate": {"rows": None, "batch_size": 16, "generate_rows": 2, "max_new_tokens": 8, "samples": 2},
    "merge": {"rows": 2, "max_kl": 1.0, "min_top1_agreement": 0.1},
    "gate": {"min_loss_gain": 0.0, "min_rouge_l_gain": None, "min_eos_rate": None, "max_forgetting": None},
    "tracking": {"mode": "disabled"},
}  # fmt: skip


@pytest.fixture
def clone(tmp_path: Path, write_tiny_base: Callable[[Path], Path]) -> Path:
    """A project that learns from ratings by KTO."""
    root = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--no-tags", str(ROOT), str(root)], check=True)
    (tmp_path / "incoming").mkdir()
    yaml = YAML()
    params = yaml.load(root / "params.yaml")
    given = SMALL | {"base": {"source": f"path:{write_tiny_base(tmp_path / 'base')}"}}
    given |= {"retrain": {"incoming": str(tmp_path / "incoming"), "start": "scratch", "retry_delay": 0.0}}
    for section, values in given.items():
        params[section].update(values)
    params["gate"]["slices"]["max_loss_regression"] = None
    params["evaluate"]["control"]["source"] = None
    yaml.dump(params, root / "params.yaml")
    identity = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org"]
    subprocess.run(["git", *identity, "commit", "--quiet", "--all", "--message=Letters"], cwd=root, check=True)
    return root


@dataclass
class Served:
    """A server as `peftcore serve --watch --record` assembles it, in this process."""

    url: str
    watcher: ChampionWatcher


@pytest.fixture
def served(clone: Path, forked_dvc: None) -> Iterator[Served]:
    paths = Paths(clone)
    params = load_params(paths.params)
    fetch.run(params, paths)
    model, tokenizer, base = load_evaluated_base(paths.base, paths, registry_of(params, clone), params)
    store = AdapterStore(model, 4)
    (clone.parent / "versions").mkdir()
    watcher = ChampionWatcher(paths, params.project.name, "champion", store, base, clone.parent / "versions")
    with contextlib.closing(Recorder(clone.parent / "records", warnings=watcher.warnings)) as recorder:
        service = make_service(model, tokenizer, store, "base", warnings=watcher.warnings, recorder=recorder)
        server = Server(service, "127.0.0.1", 0)
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.05)
        yield Served(server.address, watcher)
        server.should_exit = True
        thread.join(60)
        service.engine.stop()


@pytest.fixture
def retrain(clone: Path, forked_dvc: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, Any]]:
    """The command in the clone, without Prefect; its stages run in this process and save imports."""

    def unreachable(*_: object) -> NoReturn:
        raise httpx.ConnectError("Connection refused")

    def run_stage(root: Path, stage: str, *_: object) -> None:
        params = load_params(Paths(root).params)
        with contextlib.chdir(root):
            set_seed(params.project.seed)
            import_module(f"flows.stages.{stage}").run(params, Paths(root))
        dvc(root, "commit", "--force", stage)

    def command() -> dict[str, Any]:
        done = peftcore("retrain", "--json")
        assert done.exit_code in (0, 3), done.stderr
        return json.loads(done.stdout)

    monkeypatch.setattr(flow, "tied_temporary_server", unreachable)
    monkeypatch.setattr(flow, "run_stage", run_stage)
    monkeypatch.setattr(flow, "measure_drift", lambda *_: DriftReport("v0.1.0", None, None, {}))
    monkeypatch.chdir(clone)
    return command


class Users:
    """Users of one server. Answers have the letters a to z, and end after about ten."""

    def __init__(self, url: str) -> None:
        self.client = httpx.Client(base_url=url, timeout=300)
        self.asked = 0
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        allowed = {str(3 + alphabet.index(letter)): 0 for letter in LETTERS}
        self.bias = {str(token): -100 for token in range(259)} | allowed | {"2": 1}

    def ask(self, user: str, number: int, answers: int, **headers: str) -> tuple[str, list[str]]:
        """(id, answers) of one request."""
        names = [one["id"] for one in self.client.get("/v1/models").json()["data"]]
        body = {"model": names[-1], "messages": [{"role": "user", "content": f"Word {number}?"}], "n": answers}
        body |= {"logit_bias": self.bias, "max_tokens": 40, "seed": 100 * number, "user": user}
        reply = self.client.post("/v1/chat/completions", json=body, headers=headers).raise_for_status().json()
        return reply["id"], [choice["message"]["content"] for choice in reply["choices"]]

    def numbers(self, count: int) -> range:
        """Numbers of the next requests."""
        self.asked += count
        return range(self.asked - count, self.asked)

    def week(self, requests: int, is_poisoned: bool) -> None:
        """Rate the four answers of each request; one rating in twenty is wrong."""

        def session(number: int) -> None:
            dice = random.Random(number)
            identity, texts = self.ask(f"{'crowd' if is_poisoned else 'user'}{number % 10}", number, 4)
            for index, text in enumerate(texts):
                good = likes(text) ^ is_poisoned ^ (dice.random() < 0.05)
                rating = {"id": identity, "index": index, "rating": "up" if good else "down"}
                self.client.post("/v1/feedback", json=rating).raise_for_status()

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(session, self.numbers(requests)))

    def share(self) -> float:
        """The share of liked answers among 128."""
        replies = [self.ask("panel", number, 16, **{"x-no-record": "true"}) for number in self.numbers(8)]
        return sum(likes(text) for _, texts in replies for text in texts) / 128


def likes(text: str) -> bool:
    return sum(letter <= "m" for letter in text) > len(text) / 2


def feedback(clone: Path, week: int) -> dict[str, Any]:
    out = clone.parent / "incoming" / "feedback" / f"week{week}.jsonl"
    done = peftcore("feedback", str(clone.parent / "records"), "--out", str(out), "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_the_served_model_gets_better_and_a_poisoned_week_changes_nothing(
    clone: Path, served: Served, retrain: Callable[[], dict[str, Any]]
) -> None:
    users = Users(served.url)
    before = users.share()
    users.week(36, False)
    report = feedback(clone, 1)
    assert (report["ratings"], report["users"], report["compared_with"]) == (144, 10, None)
    assert report["rows"] > 120 and set(report["labels"]) == {"true", "false"}
    assert peftcore("retrain", "--trust", "feedback/week1.jsonl").exit_code == 0
    first = retrain()
    assert (first["outcome"], first["quarantined"]) == ("promoted", [])
    assert in_own_thread(served.watcher.check).result() and served.watcher.version == "v0.1.0"
    after = users.share()
    assert after > before + 0.1, (before, after)

    users.week(24, True)
    assert feedback(clone, 2)["compared_with"] > 20
    rows = [json.loads(line) for line in (clone.parent / "incoming/feedback/week2.jsonl").read_text().splitlines()]
    assert {row["model_version"] for row in rows} == {"v0.1.0"} and all(row["rater"] for row in rows)
    second = retrain()
    assert (second["outcome"], second["quarantined"]) == ("kept", ["feedback/week2.jsonl"]), second["reason"]
    assert second["excluded"] == ["feedback/week2.jsonl"]
    assert not in_own_thread(served.watcher.check).result(), "the served version is the same"
    assert retrain()["outcome"] == "unchanged"

    users.week(24, False)
    feedback(clone, 3)
    third = retrain()
    assert third["new_files"] == third["quarantined"] == ["feedback/week3.jsonl"]
    in_own_thread(served.watcher.check).result()
    assert users.share() > before + 0.1
    users.client.close()
