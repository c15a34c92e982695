"""Four weeks of feedback on the real base, one of them poisoned: what users of known taste think of what is served.

    python -m benchmarks.feedback FOLDER [--requests 64] [--panel 48]

In FOLDER, which is new, the repository is cloned, and one real `peftcore serve --watch --record` runs over all weeks.
Users ask short questions and rate the answers by one taste: at most 16 words, the last of which ends with a full stop.
A share NOISE of the ratings is wrong. In week 2 a crowd of other accounts gives CROWD of the ratings, and rates the
opposite. After each week `peftcore feedback` makes rows for KTO, and `peftcore retrain` trains from the champion and
asks the gate. A person looks at week 1 and trusts its file, so its rows are the test set; nobody trusts later files.

The users' own measure is the share of answers to a panel of other questions that fit the taste, without noise, asked of
the served model before and after each retraining. A candidate that is refused is also measured, served by its adapter.
There is no peer: HF PEFT has no server and no pipeline. Writes results/feedback.md and .json.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from ruamel.yaml import YAML

from benchmarks.machine import machine

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
WEEKS = ("1, trusted", "2, poisoned", "3", "4")
WORDS, NOISE, CROWD = 16, 0.1, 0.8
MAX_TOKENS = 32
MODEL = "docstrings"
SYSTEM = "Answer in one short sentence."
THINGS_TEXT = """
kettle bridge river mirror clock magnet library harbour pencil ladder candle window basket hammer
needle bottle blanket ticket garden tunnel engine wheel pillow button bucket carpet ribbon shovel
whistle lantern compass anchor violin trumpet drum piano spoon fork plate kitchen bakery market
museum theatre station airport castle tower fence gate roof chimney cellar attic forest desert
island valley glacier volcano meadow swamp beach cliff cave waterfall horse rabbit eagle salmon
spider beetle dolphin tiger turtle penguin
"""
THINGS = THINGS_TEXT.split()
QUESTIONS = ("What is a {}?", "What is a {} for?", "Where do you find a {}?", "Name one fact about a {}.")


def main() -> None:
    """Run the weeks and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--requests", type=int, default=64, help="rated answers of a week; half as many more in the first"
    )
    parser.add_argument("--panel", type=int, default=48, help="questions of the users' own measure")
    parser.add_argument("--base", type=Path, default=ROOT / "artifacts" / "base")
    given = parser.parse_args()
    if given.folder.exists():
        parser.error(f"{given.folder} is there already; give a new folder")
    given.folder.mkdir(parents=True)
    clone, incoming, records = (given.folder.resolve() / name for name in ("clone", "incoming", "records"))
    incoming.mkdir()
    subprocess.run(["git", "clone", "--quiet", "--no-tags", str(ROOT), str(clone)], check=True)
    _settle(clone, incoming, given.base.resolve())
    questions = [question.format(thing) for question in QUESTIONS for thing in THINGS]
    random.Random(1).shuffle(questions)
    panel, asked = questions[: given.panel], questions[given.panel :]
    weeks: list[dict[str, Any]] = []
    started = time.monotonic()
    _peftcore(clone, "stage", "fetch")
    base = clone / "artifacts" / "base"
    with _served(clone, base, given.folder / "serve.log", "--watch", "--record", str(records)) as url:
        share = _share(url, _model(url), panel)
        for number, week in enumerate(WEEKS):
            before, model = share, _model(url)
            requests = given.requests if number else given.requests * 3 // 2
            _live(url, model, asked, requests, number, "poisoned" in week)
            report = _feedback(clone, records, weeks)
            if "trusted" in week:
                _peftcore(clone, "retrain", "--trust", f"feedback/{Path(report['path']).name}")
            verdict = _retrain(clone)
            if verdict["outcome"] == "promoted":
                _until_served(url)
                share = _share(url, MODEL, panel)
            candidate = share
            if verdict["outcome"] == "kept":
                candidate = _share_of_candidate(clone, base, given.folder.resolve(), verdict["version"], panel)
            weeks.append(
                {"week": week, "before": before, "after": share, "candidate": candidate, "feedback": report}
                | {name: verdict[name] for name in ("outcome", "version", "reason", "quarantined", "excluded", "wall")}
                | {"minutes": (time.monotonic() - started) / 60}
            )
            print(_row(weeks[-1]), flush=True)
            facts = {"machine": machine(), "requests": given.requests, "panel": given.panel, "weeks": weeks}
            (RESULTS / "feedback.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            (RESULTS / "feedback.md").write_text(_table(facts), encoding="utf-8")
    print((RESULTS / "feedback.md").read_text(encoding="utf-8"))


# -- the users -------------------------------------------------------------------------------------------------------


def likes(answer: str) -> bool:
    """The users' taste."""
    return len(answer.split()) <= WORDS and answer.strip().endswith(".")


def _live(url: str, model: str, questions: list[str], requests: int, week: int, poisoned: bool) -> None:
    """One week of requests and ratings."""
    dice = random.Random(100 + week)
    sessions = []
    for number in range(requests):
        is_crowd = poisoned and dice.random() < CROWD
        user = f"crowd{dice.randrange(60)}" if is_crowd else f"user{dice.randrange(30)}"
        sessions.append((dice.choice(questions), 1000 * week + number, user, is_crowd, dice.random() < NOISE))

    def one(session: tuple[str, int, str, bool, bool]) -> None:
        question, seed, user, is_crowd, is_wrong = session
        reply = _ask(client, model, question, seed, user)
        good = likes(reply["choices"][0]["message"]["content"]) ^ is_crowd ^ is_wrong
        rating = {"id": reply["id"], "rating": "up" if good else "down"}
        client.post("/v1/feedback", json=rating).raise_for_status()

    with httpx.Client(base_url=url, timeout=600) as client, ThreadPoolExecutor(16) as pool:
        list(pool.map(one, sessions))


def _share(url: str, model: str, panel: list[str]) -> float:
    """The users' own measure of a served model."""
    headers = {"x-no-record": "true"}
    with httpx.Client(base_url=url, timeout=600, headers=headers) as client, ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda pair: _ask(client, model, pair[1], pair[0], "panel"), enumerate(panel)))
    return sum(likes(reply["choices"][0]["message"]["content"]) for reply in replies) / len(panel)


def _ask(client: httpx.Client, model: str, question: str, seed: int, user: str) -> dict[str, Any]:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    body = {"model": model, "messages": messages, "max_tokens": MAX_TOKENS, "seed": seed, "user": user}
    return client.post("/v1/chat/completions", json=body).raise_for_status().json()


# -- the project -----------------------------------------------------------------------------------------------------


def _settle(clone: Path, incoming: Path, base: Path) -> None:
    """A repository that learns from ratings by KTO, with an evaluation of minutes."""
    yaml = YAML()
    yaml.width = 200
    params = yaml.load(clone / "params.yaml")
    changes: dict[str, dict[str, Any]] = {
        "project": {"name": MODEL},
        "base": {"source": f"path:{base}"},
        "data": {
            "source": "data/rows",
            "kind": "unpaired_preference",
            "system_prompt": None,
            "max_length": 128,
            "assignment": "hashed",
            "slice_column": None,
            "group_column": None,
            "train_rows": None,
            "validation_rows": 16,
            "test_rows": None,
            "validation_share": 0.12,
            "test_share": 0.35,
            "near_duplicates": "keep",  # questions differ by one word here
        },
        "quantization": {"storage": "none"},
        "train": {
            "objective": "kto",
            "epochs": 3.0,
            "batch_size": 8,
            "gradient_accumulation": 1,
            "learning_rate": 5e-4,
            "evaluations": 1,
        },
        "evaluate": {"rows": None, "generate_rows": 2, "samples": 2, "max_new_tokens": MAX_TOKENS, "latency_rows": 0},
        "merge": {"rows": 4, "max_kl": 1.0, "min_top1_agreement": 0.5},
        "gate": {"min_loss_gain": 0.0, "min_rouge_l_gain": None, "min_eos_rate": None, "max_forgetting": None},
        "retrain": {"incoming": str(incoming), "retry_delay": 0.0},
        "tracking": {"mode": "disabled"},
    }
    for section, values in changes.items():
        params[section].update(values)
    params["train"]["kto"]["desirable_weight"] = 2.0  # bad answers are more frequent at first
    params["evaluate"]["control"]["source"] = None
    params["gate"]["slices"]["max_loss_regression"] = None
    yaml.dump(params, clone / "params.yaml")
    author = ["-c", "user.name=weeks", "-c", "user.email=weeks@localhost"]
    subprocess.run(["git", "-C", str(clone), *author, "commit", "--quiet", "--all", "--message=Learn from ratings"],
                   check=True)  # fmt: skip


@contextmanager
def _served(clone: Path, base: Path, log: Path, *options: str) -> Iterator[str]:
    """`peftcore serve` in a process of its own; gives its address."""
    command = [sys.executable, "-m", "flows.cli", "serve", "--base", str(base), "--port", "0", *options]
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=clone, env=_environment(clone), stderr=file)
    try:
        while not (match := re.search(r"serving .* on (http://\S+)", log.read_text(encoding="utf-8"))):
            if process.poll() is not None:
                raise SystemExit(f"the server ended: {log.read_text(encoding='utf-8')[-2000:]}")
            time.sleep(0.2)
        yield match.group(1)
    finally:
        process.terminate()
        process.wait()


def _model(url: str) -> str:
    """The served champion; the base if there is none."""
    names = [one["id"] for one in httpx.get(f"{url}/v1/models").json()["data"]]
    return MODEL if MODEL in names else names[0]


def _until_served(url: str) -> None:
    """Wait until the watcher has looked at the registry twice."""
    time.sleep(15)
    assert _model(url) == MODEL, httpx.get(f"{url}/ready").text


def _share_of_candidate(clone: Path, base: Path, folder: Path, version: str, panel: list[str]) -> float:
    """The users' own measure of a refused version: what they would have got without the gate."""
    adapters = folder / f"refused-{version}"
    adapters.mkdir()
    got = ["get", "--quiet", str(clone), "artifacts/adapter", "--rev", f"{MODEL}@{version}"]
    subprocess.run([sys.executable, "-m", "dvc", *got, "--out", str(adapters / "candidate")], check=True)
    with _served(clone, base, folder / f"{version}.log", "--adapters", str(adapters)) as url:
        return _share(url, "candidate", panel)


def _feedback(clone: Path, records: Path, weeks: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of the ratings that no earlier file has."""
    out = clone.parent / "incoming" / "feedback" / f"week{len(weeks) + 1}.jsonl"
    return json.loads(_peftcore(clone, "feedback", str(records), "--out", str(out), "--json"))


def _retrain(clone: Path) -> dict[str, Any]:
    started = time.monotonic()
    verdict = json.loads(_peftcore(clone, "retrain", "--json"))
    return verdict | {"wall": time.monotonic() - started}


def _peftcore(clone: Path, *arguments: str) -> str:
    """Run a command as a user types it, and return its output. Exit code 3 is a refusal of the gate."""
    command = [sys.executable, "-m", "flows.cli", *arguments]
    done = subprocess.run(command, cwd=clone, env=_environment(clone), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 3):
        raise SystemExit(f"peftcore {' '.join(arguments)} ended with {done.returncode}")
    return done.stdout


def _environment(clone: Path) -> dict[str, str]:
    # no server is at this address, so that a retraining does without Prefect, whose server takes a while to start
    return {**os.environ, "PYTHONPATH": str(clone), "PREFECT_API_URL": "http://127.0.0.1:9/api"}


# -- the table -------------------------------------------------------------------------------------------------------


def _row(week: dict[str, Any]) -> str:
    feedback = week["feedback"]
    labels = feedback["labels"]
    return (
        f"| {week['week']} | {feedback['ratings']} | {labels.get('true', 0)} + {labels.get('false', 0)} "
        f"| {100 * week['before']:.0f} % | {100 * week['candidate']:.0f} % | {week['outcome']} {week['version']} "
        f"| {100 * week['after']:.0f} % | {week['wall']:.0f} | {week['reason']} |"
    )


def _table(facts: dict[str, Any]) -> str:
    head = (
        f"Four weeks of feedback, {facts['requests']} rated answers each, in the first half as many more; KTO on "
        "SmolLM2-135M-Instruct, from the champion. The users' own measure is the share of "
        f"{facts['panel']} answers with at most {WORDS} words and a full stop. {NOISE:.0%} of the ratings are wrong; "
        f"in week 2 a crowd gives {CROWD:.0%} of them and rates the opposite. {facts['machine']}.\n\n"
        "| week | ratings so far | rows, good + bad | served before | candidate | verdict | served after | seconds of "
        "retraining | reason |\n|---|---|---|---|---|---|---|---|---|\n"
    )
    excluded = [f"week {week['week']}: {', '.join(week['excluded'])}" for week in facts["weeks"] if week["excluded"]]
    note = f"\nExcluded from later trainings: {'; '.join(excluded)}.\n" if excluded else ""
    return head + "\n".join(_row(week) for week in facts["weeks"]) + "\n" + note


if __name__ == "__main__":
    main()
