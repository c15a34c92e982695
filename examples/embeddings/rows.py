"""Write data/search.jsonl: the first sentence of a docstring as the query, and the source of its function."""

import json
import random
import sysconfig
from pathlib import Path

from flows.data.docstrings import pairs

ROWS = 3000

unique = {pair.summary: pair for pair in pairs(Path(sysconfig.get_paths()["stdlib"]))}
"""A sentence that stands at several functions has no single right answer, so one of them stays."""
chosen = random.Random(0).sample(list(unique.values()), ROWS)
target = Path("data/search.jsonl")
target.parent.mkdir(exist_ok=True)
with target.open("w", encoding="utf-8") as file:
    for pair in chosen:
        row = {"query": pair.summary, "positive": pair.source, "module": pair.module}
        file.write(json.dumps(row) + "\n")
print(f"{target.absolute()}: {ROWS} functions of the standard library")
