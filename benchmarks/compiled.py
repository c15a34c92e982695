"""Whether `torch.compile` pays for a training step: floor, ours and HF PEFT, each as it is and compiled.

    python -m benchmarks.compiled          # about 4 minutes; results/compiled.md

Compiled is block by block (`block.compile()`), as one compiles a deep model: the blocks are alike, so one is compiled
and the others use its code. SmolLM2-135M's shape with random weights, LoRA r = 16 on all linear layers, 4 x 256 tokens.
While it is being traced, ours takes the general path (base layer, then adapter); what is compiled is that.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.steps import (
    DTYPES,
    FLOOR,
    OURS,
    PEFT,
    Row,
    Setting,
    build,
    make_batch,
    measure,
    quiet,
    random_base,
    step,
)

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    options = parse()
    quiet()
    with tempfile.TemporaryDirectory() as scratch:
        folder = random_base(Path(scratch) / "base", options.blocks)
        setting = Setting(folder, options.dtype, dropout=options.dropout, batch=options.batch, length=options.length)
        report = run(setting, Path(scratch), options)
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "compiled.md").write_text(report, encoding="utf-8")
    print(report)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.compiled", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--blocks", type=int, default=10, help="of the base")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens a row")
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds, at least 7")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results are written")
    options = parser.parse_args()
    if options.repeats < 7:
        parser.error(f"--repeats: a median of {options.repeats} says little; give at least 7")
    return options


def run(setting: Setting, scratch: Path, options: argparse.Namespace) -> str:
    """The table."""
    plain = [row for row in build(setting, scratch) if row.name in (FLOOR, OURS, PEFT)]
    compiled = [row for row in build(setting, scratch) if row.name in (FLOOR, OURS, PEFT)]
    labels = make_batch(plain[0].model, setting)[1]
    first = [compile_blocks(row, labels) for row in compiled]
    measure([*plain, *compiled], labels, options.repeats)
    lines = [
        f"`python -m benchmarks.compiled`: {setting.dtype}, dropout {setting.dropout:g}, {options.blocks} blocks, "
        f"lora r {setting.rank}, batch {setting.batch} x {setting.length}, {options.repeats} rounds; "
        f"{machine()}, peft {peft.__version__}",
        "",
        "| row | as it is, ms | compiled, ms | compiled / as it is | first step, s |",
        "|---|---|---|---|---|",
    ]
    for eager, own, seconds in zip(plain, compiled, first, strict=True):
        ratio = statistics.median(b / a for a, b in zip(eager.seconds, own.seconds, strict=True))
        before, after = (statistics.median(row.seconds) * 1e3 for row in (eager, own))
        lines.append(f"| {eager.name} | {before:.0f} | {after:.0f} | {ratio:.2f} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def compile_blocks(row: Row, labels: Tensor) -> float:
    """Compile every block of a row's model; seconds of its first step, compilation included."""
    model: Any = row.model
    llama = model.get_base_model() if row.name == PEFT else model
    # All models of a class count against one limit, beyond which nothing more is compiled.
    torch._dynamo.config.recompile_limit = 1000
    for block in llama.model.layers:
        block.compile(fullgraph=row.name == OURS)
    start = time.perf_counter()
    step(row, labels)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
