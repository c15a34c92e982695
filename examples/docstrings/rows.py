"""Write data/docstrings.jsonl: functions of an installed package with the first sentence of their docstrings."""

import argparse
import importlib.util
import json
from pathlib import Path

from flows.data.docstrings import pairs, prompt

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("package", nargs="?", default="networkx", help="an installed package with docstrings")
package = parser.parse_args().package
found = importlib.util.find_spec(package)
if found is None or found.origin is None:
    parser.error(f"there is no installed package {package!r}; `pip list` names those that there are")
rows = [
    {
        "prompt": prompt(pair.source),
        "completion": pair.summary,
        "module": pair.module,  # the functions of a module stay in one split
        "part": pair.module.partition(".")[0],
    }
    for pair in pairs(Path(found.origin).parent)
]
out = Path(__file__).parent / "data" / "docstrings.jsonl"
out.parent.mkdir(exist_ok=True)
out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
print(f"{out}: {len(rows)} functions of {package}")
