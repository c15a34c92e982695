"""How closely this library and HF PEFT agree, method by method, written into docs/methods.md.

    python -m benchmarks.parity

Runs the parity tests: each writes an adapter with random weights in one library, reads it in the other, on tiny models
and single layers in float32, and compares what both compute. The table is what these comparisons found.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TESTS = ("tests/peftcore/test_parity.py", "tests/peftcore/methods", "tests/peftcore/prompts")
BEGIN, END = "<!-- parity -->", "<!-- /parity -->"


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "parity.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", *TESTS, "-k", "parity or peft", "-m", "slow or not slow"]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "PEFTCORE_PARITY_LOG": str(log)}, check=True)
        text = table([json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()])
    page = ROOT / "docs" / "methods.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{text}{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(text)


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: for each method what was compared, and the largest difference each way."""
    by_method: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        by_method[record["method"]].append(record)
    theirs = f"HF PEFT {version('peft')}"
    lines = [
        f"| method | compared on | comparisons | {theirs}'s directory read here | ours read there |",
        "|---|---|---|---|---|",
    ]
    for method, found in sorted(by_method.items()):
        subjects = ", ".join(dict.fromkeys(record["subject"] for record in found))
        here, there = (_largest(found, made_by) for made_by in ("peft", "peftcore"))
        lines.append(f"| {method} | {subjects} | {len(found)} | {here} | {there} |")
    return "\n".join(lines) + "\n"


def _largest(records: list[dict[str, Any]], made_by: str) -> str:
    largest = max(record["difference"] for record in records if record["made_by"] == made_by)
    return f"{largest:.1e}" if largest else "0"


if __name__ == "__main__":
    main()
