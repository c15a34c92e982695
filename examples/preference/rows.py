"""Write data/pairs.jsonl: a function, its own docstring summary (chosen) and that of a neighbour (rejected)."""

import importlib.util
import json
from itertools import groupby
from pathlib import Path

from flows.data.docstrings import pairs, prompt

PACKAGE = "networkx"
origin = importlib.util.find_spec(PACKAGE).origin
rows = []
for module, functions in groupby(pairs(Path(str(origin)).parent), key=lambda pair: pair.module):
    ordered = list(functions)
    # the neighbour's sentence has the same style and the same subject, and describes another function
    for own, neighbour in zip(ordered, ordered[1:] + ordered[:1], strict=True):
        if own.summary != neighbour.summary:
            pair = {"prompt": prompt(own.source), "chosen": own.summary, "rejected": neighbour.summary}
            rows.append(pair | {"module": module})
out = Path(__file__).parent / "data" / "pairs.jsonl"
out.parent.mkdir(exist_ok=True)
out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
print(f"{out}: {len(rows)} pairs from {PACKAGE}")
