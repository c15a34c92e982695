"""Four weeks of retraining on the real base and the docstring data, one of them bad: what each comes to and takes.

    python -m benchmarks.retraining FOLDER [--start champion] [--rows 320]

In FOLDER, which is new, the repository is cloned, and files come in week by week: the standard library's modules dealt
out by their hash, a file a week. In the third week the answers are shuffled among the functions. After each week the
retraining runs once more, with nothing new. There is no peer: HF PEFT has no pipeline. Writes results/retraining.md and
.json, and copies of the page's figures are in FOLDER.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from benchmarks.machine import machine
from flows.data.docstrings import Pair, pairs, prompt
from flows.data.splits import rank

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
WEEKS = ("week1", "week2", "week3-shuffled", "week4")
SEED = 42
TRAINS = 0.65
"""Share of the rows that is neither for validation nor for the test."""


def main() -> None:
    """Run the weeks and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--start", choices=("scratch", "champion"), default="scratch")
    parser.add_argument("--rows", type=int, default=320, help="training rows of a week")
    parser.add_argument("--small", action="store_true", help="two steps a week, to see that it works")
    given = parser.parse_args()
    if given.folder.exists():
        parser.error(f"{given.folder} is there already; give a new folder")
    given.folder.mkdir(parents=True)
    clone, incoming = given.folder / "clone", given.folder / "incoming"
    incoming.mkdir()
    subprocess.run(["git", "clone", "--quiet", "--no-tags", str(ROOT), str(clone)], check=True)
    _settle(clone, incoming, given.start, given.rows, given.small)
    shards = _shards(given.rows)
    weeks = []
    for week in WEEKS:
        rows = shards[week]
        (incoming / f"{week}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for again in (False, True):
            weeks.append({"week": week, "again": again, "rows": len(rows), **_retrain(clone)})
            print(_row(weeks[-1]), flush=True)
    told = {
        "machine": machine(),
        "start": given.start,
        "rows": given.rows,
        "weeks": weeks,
    }
    name = "retraining" if given.start == "scratch" else "retraining_champion"
    (RESULTS / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(_table(told), encoding="utf-8")
    print(_table(told))
    print(clone / "reports" / "retraining" / "index.html")


def _settle(clone: Path, incoming: Path, start: str, rows: int, small: bool) -> None:
    """A repository that retrains on files, smaller than the default so that four weeks take minutes."""
    yaml = YAML()
    yaml.width = 200
    params = yaml.load(clone / "params.yaml")
    base = ROOT / "artifacts" / "base"
    changes: dict[str, dict[str, Any]] = {
        "data": {
            "source": "data/rows",
            "assignment": "hashed",
            "group_column": "module",
            "slice_column": "package",
            "validation_share": 0.1,
            "test_share": 0.25,
            "train_rows": None,
            "validation_rows": 48,
            "test_rows": 128,
        },
        "train": {"evaluations": 2},
        "evaluate": {"rows": 128, "generate_rows": 64, "samples": 6},
        "merge": {"rows": 16},
        "retrain": {"incoming": str(incoming), "start": start, "retry_delay": 0.0},
        "tracking": {"mode": "disabled"},
    }
    if (base / "SHA256SUMS").exists():
        changes["base"] = {"source": f"path:{base}"}
    if small:
        changes["train"] |= {"max_steps": 2, "evaluations": 1}
        changes["evaluate"] |= {"rows": 16, "generate_rows": 4, "samples": 2, "max_new_tokens": 8}
        changes["gate"] = {"min_loss_gain": -5.0, "min_rouge_l_gain": -1.0, "min_eos_rate": 0.0}
    for section, values in changes.items():
        params[section].update(values)
    yaml.dump(params, clone / "params.yaml")
    subprocess.run(["git", "-C", str(clone), "-c", "user.name=weeks", "-c", "user.email=weeks@localhost", "commit",
                    "--quiet", "--all", "--message=Retrain on files"], check=True)  # fmt: skip


def _shards(rows: int) -> dict[str, list[dict[str, str]]]:
    """Each week's rows, of modules that are in no other week, a dozen functions of each; rows: that will train."""
    import sysconfig

    known: dict[str, list[Pair]] = {}
    for pair in pairs(Path(sysconfig.get_paths()["stdlib"])):
        if len(pair.source) < 1200:
            known.setdefault(pair.module, []).append(pair)
    # another order than the one that deals modules to splits
    modules = sorted(known, key=lambda module: rank(SEED + 1, module))
    shards: dict[str, list[dict[str, str]]] = {week: [] for week in WEEKS}
    for module in modules:
        week = next((week for week in WEEKS if len(shards[week]) < rows / TRAINS), None)
        if week is None:
            break
        shards[week] += [
            {"prompt": prompt(one.source), "completion": one.summary, "module": module, "package": module.split(".")[0]}
            for one in known[module][:12]
        ]
    if short := [week for week in WEEKS if len(shards[week]) < rows / TRAINS]:
        raise SystemExit(f"the standard library has too few functions for {', '.join(short)}; give fewer --rows")
    for week in WEEKS:
        if week.endswith("shuffled"):
            answers = [row["completion"] for row in shards[week]]
            random.Random(SEED).shuffle(answers)
            shards[week] = [row | {"completion": answer} for row, answer in zip(shards[week], answers, strict=True)]
    return shards


def _retrain(clone: Path) -> dict[str, Any]:
    """One `peftcore retrain` as a user types it."""
    environment = {**os.environ, "PYTHONPATH": str(clone)}
    command = [sys.executable, "-m", "flows.cli", "retrain", "--json"]
    started = time.monotonic()
    done = subprocess.run(command, cwd=clone, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    wall = time.monotonic() - started
    if done.returncode not in (0, 3):
        raise SystemExit(f"peftcore retrain ended with {done.returncode}")
    return {"status": done.returncode, "wall": wall, **json.loads(done.stdout)}


def _row(week: dict[str, Any]) -> str:
    metrics, drift = week["metrics"], week["drift"] or {"files": {}}
    losses = [file["loss"] for file in drift["files"].values() if "loss" in file]
    figures = [f"{metrics['base']['loss']:.3f}", f"{metrics['adapter']['loss']:.3f}"] if metrics else ["", ""]
    gap = f"{losses[0]:.2f} ({losses[0] - drift['champion_loss']:+.2f})" if losses else ""
    cells = [week["week"] + (", again" if week["again"] else ""), *figures, gap, week["outcome"], week["version"] or ""]
    return "| " + " | ".join([*cells, f"{week['wall']:.1f}", week["reason"]]) + " |"


def _table(told: dict[str, Any]) -> str:
    head = (
        f"Four weeks of docstrings, about {told['rows']} training rows each, training from {told['start']}; "
        f"{told['machine']}.\n\n"
        "| week | base, nats | candidate | champion's loss on the new rows | outcome | version | seconds | reason |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(_row(week) for week in told["weeks"]) + "\n"


if __name__ == "__main__":
    main()
