"""What recomputing activations saves and costs: the modes of `peftcore.train.recompute_activations`, and one not taken.

    python -m benchmarks.recomputation        # about 3 minutes; results/recomputation.md

SmolLM2-135M's shape, random weights in bf16, LoRA r = 16 on all linear layers, 1,024 tokens: in rows of 256 with plain
attention, as the train stage has them on a CPU, and in one row with PyTorch's fused attention. The mode that was not
taken recomputes the feed-forward module of every block. Bytes are exact; times move with what else the machine does.
"""

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.checkpoint import checkpoint

from benchmarks.machine import machine
from benchmarks.steps import OURS, Row, Setting, build_alone, make_batch, quiet, random_base, saved_bytes, step
from peftcore.train import recompute_activations

RESULTS = Path(__file__).parent / "results"
FEED_FORWARD = "feed-forward modules"
MODES = ("none", "selective", FEED_FORWARD, "blocks")
SHAPES = {"4 x 256, plain attention": ("eager", 4, 256), "1 x 1024, fused attention": ("sdpa", 1, 1024)}
"""{heading: (attention, rows, tokens a row)}"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.recomputation", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=10, help="of the base")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results are written")
    options = parser.parse_args()
    quiet()
    lines = ["| | recomputed | saved MiB | / none | step, ms | / none |", "|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = random_base(Path(scratch) / "base", options.blocks)
        for heading, shape in SHAPES.items():
            lines += measure(folder, heading, shape, options.repeats)
    text = f"# Recomputed activations\n\n{options.blocks} blocks. {machine()}\n\n" + "\n".join(lines) + "\n"
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "recomputation.md").write_text(text, encoding="utf-8")
    print(text)


def measure(folder: Path, heading: str, shape: tuple[str, int, int], repeats: int) -> list[str]:
    """A line of the table for each mode, their steps interleaved."""
    attention, rows, length = shape
    setting = Setting(folder, batch=rows, length=length)
    row = build_alone(setting, OURS)
    model: Any = row.model
    model.set_attn_implementation(attention)
    labels = make_batch(model, setting)[1]
    saved: dict[str, int] = {}
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for round_number in range(-1, repeats):
        for mode in MODES:
            switch(row, mode)
            if round_number < 0:
                saved[mode] = saved_bytes(row, labels)
            taken = step(row, labels)
            if round_number >= 0:
                seconds[mode].append(taken)
    lines = []
    for mode in MODES:
        ratio = statistics.median(a / b for a, b in zip(seconds[mode], seconds["none"], strict=True))
        lines.append(
            f"| {heading if mode == 'none' else ''} | {mode} | {saved[mode] / 2**20:.0f} | "
            f"{saved[mode] / saved['none']:.2f} | {1e3 * statistics.median(seconds[mode]):.0f} | {ratio:.2f} |"
        )
    return lines


def switch(row: Row, mode: str) -> None:
    """Have the model recompute in this mode and no other."""
    model: Any = row.model
    for block in model.model.layers:
        vars(block.mlp).pop("forward", None)
        if mode == FEED_FORWARD:
            block.mlp.forward = partial(checkpoint, block.mlp.forward, use_reentrant=False)
    recompute_activations(model, "none" if mode == FEED_FORWARD else mode)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
