"""Weeks of feedback on a tiny model: a real server records, ratings become rows, KTO trains, the gate decides.

Users like answers whose letters are mostly a to m. In the second week a crowd rates the opposite.
"""

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest
from command_line import peftcore
from ruamel.yaml import YAML

from flows.retraining import flow

pytestmark = [pytest.mark.proof, pytest.mark.timeout(2400)]
ROOT = Path(__file__).parents[3]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SMALL: dict[str, dict[str, Any]] = {
    "project": {"name": "letters"},
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
    given |= {"retrain": {"incoming": str(tmp_path / "incoming"), "start": "champion", "retry_delay": 0.0}}
    for section, values in given.items():
        params[section].update(values)
    params["gate"]["slices"]["max_loss_regression"] = None
    params["evaluate"]["control"]["source"] = None
    yaml.dump(params, root / "params.yaml")
    identity = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org"]
    subprocess.run(["git", *identity, "commit", "--quiet", "--all", "--message=Letters"], cwd=root, check=True)
    return root


@pytest.fixture
def url(clone: Path) -> Iterator[str]:
    """Address of `peftcore serve --watch --record` in a process of its own."""
    command = [sys.executable, "-c", "from flows.cli import app; app()", "serve", "--port", "0", "--watch"]
    options = [
        "--watch-seconds",
        "0.5",
        "--base",
        str(clone.parent / "base"),
        "--record",
        str(clone.parent / "records"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (clone.parent / "serve.log").open("w") as log:
        process = subprocess.Popen([*command, *options], cwd=clone, env=environment, stderr=log)
    try:
        while not (match := re.search(r"serving .* on (http://\S+)", (clone.parent / "serve.log").read_text())):
            assert process.poll() is None, (clone.parent / "serve.log").read_text()
            time.sleep(0.2)
        yield match.group(1)
    finally:
        process.terminate()
        assert process.wait(60) == 0


@pytest.fixture
def retrain(clone: Path, forked_stages: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, Any]]:
    """The command in this process, in the clone; Prefect's server cannot be reached."""

    def unreachable(*_: object) -> NoReturn:
        raise httpx.ConnectError("Connection refused")

    def command() -> dict[str, Any]:
        done = peftcore("retrain", "--json")
        assert done.exit_code in (0, 3), done.stderr
        return json.loads(done.stdout)

    monkeypatch.setattr(flow, "tie_temporary_server", unreachable)
    monkeypatch.chdir(clone)
    return command


class Users:
    """Users of one server. Answers have the letters a to z, and end after about ten."""

    def __init__(self, url: str) -> None:
        self.client = httpx.Client(base_url=url, timeout=300)
        self.asked = 0

    def model(self) -> str:
        names = [one["id"] for one in self.client.get("/v1/models").json()["data"]]
        return "letters" if "letters" in names else names[0]

    def ask(self, user: str, **headers: str) -> tuple[str, str]:
        """(id, answer) of one request."""
        self.asked += 1
        bias = {str(token): -100 for token in range(259)} | {str(number): 0 for number in self.tokens()} | {"2": 1}
        body = {"model": self.model(), "messages": [{"role": "user", "content": f"Word {self.asked}?"}]}
        body |= {"logit_bias": bias, "max_tokens": 40, "seed": self.asked, "user": user}
        reply = self.client.post("/v1/chat/completions", json=body, headers=headers).raise_for_status().json()
        return reply["id"], reply["choices"][0]["message"]["content"]

    def tokens(self) -> list[int]:
        from tokenizers import pre_tokenizers

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        return [3 + alphabet.index(letter) for letter in LETTERS]

    def week(self, requests: int, is_poisoned: bool) -> None:
        dice = random.Random(self.asked)
        for number in range(requests):
            identity, text = self.ask(f"{'crowd' if is_poisoned else 'user'}{number % 20}")
            good = likes(text) ^ is_poisoned ^ (dice.random() < 0.05)
            rating = {"id": identity, "rating": "up" if good else "down"}
            self.client.post("/v1/feedback", json=rating).raise_for_status()

    def share(self, count: int = 100) -> float:
        """The share of liked answers."""
        texts = [self.ask("panel", **{"x-no-record": "true"})[1] for _ in range(count)]
        return sum(map(likes, texts)) / count


def likes(text: str) -> bool:
    return len(text) > 0 and sum(letter <= "m" for letter in text) > len(text) / 2


def feedback(clone: Path, week: int) -> dict[str, Any]:
    out = clone.parent / "incoming" / "feedback" / f"week{week}.jsonl"
    done = peftcore("feedback", str(clone.parent / "records"), "--out", str(out), "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_the_served_model_gets_better_and_a_poisoned_week_changes_nothing(
    clone: Path, url: str, retrain: Callable[[], dict[str, Any]]
) -> None:
    users = Users(url)
    before = users.share()
    users.week(120, False)
    report = feedback(clone, 1)
    assert report["ratings"] == 120 and report["users"] == 20
    assert report["rows"] > 80 and set(report["labels"]) == {"true", "false"}
    assert peftcore("retrain", "--trust", "feedback/week1.jsonl").exit_code == 0
    first = retrain()
    assert (first["outcome"], first["quarantined"]) == ("promoted", [])
    until = time.monotonic() + 120
    while users.model() != "letters":
        assert time.monotonic() < until, "the champion is not served"
        time.sleep(0.2)
    after = users.share()
    assert after > before + 0.1, (before, after)

    users.week(80, True)
    assert feedback(clone, 2)["compared_with"] > 10
    second = retrain()
    assert (second["outcome"], second["quarantined"]) == ("kept", ["feedback/week2.jsonl"]), second
    assert second["excluded"] == ["feedback/week2.jsonl"]
    assert retrain()["outcome"] == "unchanged"
    rows = [json.loads(line) for line in (clone.parent / "incoming/feedback/week2.jsonl").read_text().splitlines()]
    assert {row["model_version"] for row in rows} == {"v0.1.0"} and all(row["rater"] for row in rows)

    users.week(80, False)
    feedback(clone, 3)
    third = retrain()
    assert third["new_files"] == third["quarantined"] == ["feedback/week3.jsonl"], "it takes part again, on trial"
    assert "feedback/week2.jsonl" not in third["new_files"]
    assert users.share() > before + 0.1
