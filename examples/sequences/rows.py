"""Write data/names.jsonl: names of the standard library as sources, and their words as targets."""

import json
from pathlib import Path

from names import names

rows = [{"source": name, "target": words, "style": "snake" if "_" in name else "camel"} for name, words in names()]
out = Path(__file__).parent / "data" / "names.jsonl"
out.parent.mkdir(exist_ok=True)
out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
print(f"{out}: {len(rows)} names")
