"""Write data/weeks/week1.jsonl to week3.jsonl: docstrings of a package; the answers of week 3 are mixed up."""

import importlib.util
import json
import random
from pathlib import Path

from flows.data.docstrings import pairs, prompt

PACKAGE = "networkx"
WEEKS = ("week1", "week2", "week3")
origin = importlib.util.find_spec(PACKAGE).origin
weeks: dict[str, list[dict[str, str]]] = {week: [] for week in WEEKS}
modules: dict[str, int] = {}
for pair in pairs(Path(str(origin)).parent):
    week = WEEKS[modules.setdefault(pair.module, len(modules)) % len(WEEKS)]  # a module is in one week
    weeks[week].append({"prompt": prompt(pair.source), "completion": pair.summary, "module": pair.module})
answers = [row["completion"] for row in weeks["week3"]]
random.Random(0).shuffle(answers)
weeks["week3"] = [row | {"completion": answer} for row, answer in zip(weeks["week3"], answers, strict=True)]
folder = Path(__file__).parent / "data" / "weeks"
folder.mkdir(parents=True, exist_ok=True)
for week, rows in weeks.items():
    (folder / f"{week}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{folder / week}.jsonl: {len(rows)} functions")
