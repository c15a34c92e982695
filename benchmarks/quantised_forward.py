"""What a 4-bit layer's forward costs in eval mode on a CPU: bitsandbytes' two products, and the one that ours takes.

    python -m benchmarks.quantised_forward     # half a minute; results/quantised_forward.md

The seven linear layers of one block of SmolLM2-135M's shape, random weights in NF4 with double quantisation.
"dequantised" forms the weight and multiplies, as bitsandbytes does in training; "packed" is what its layers change over
to, for good, at their first forward in eval mode where the CPU has bfloat16 instructions.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import has_avx512bf16
from torch import Tensor
from tqdm import tqdm

from benchmarks.machine import machine
from benchmarks.steps import quiet
from peftcore.bases import base_weight

RESULTS = Path(__file__).parent / "results"
SHAPES = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
"""(outputs, inputs) of q, k, v, o, gate, up and down."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOKENS = [1, 4, 8, 16, 24, 64, 256, 1024]
TARGET = 1.1
"""Largest ratio of our time to the better product's."""
Product = Callable[[Tensor], Tensor]


def main() -> None:
    options = parse()
    quiet()
    if not has_avx512bf16():
        raise SystemExit("error: this CPU has no bfloat16 instructions, so bitsandbytes has one product only here")
    report = "\n".join(
        [table(name, options) for name in DTYPES] + [changing_over(options.repeats), f"Measured on {machine()}."]
    )
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "quantised_forward.md").write_text(report + "\n", encoding="utf-8")
    print(report)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.quantised_forward", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--tokens", type=lambda text: [int(t) for t in text.split(",")], default=TOKENS)
    parser.add_argument("--repeats", type=int, default=21, help="timed rounds, at least 7")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results are written")
    options = parser.parse_args()
    if options.repeats < 7:
        parser.error(f"--repeats: a median of {options.repeats} says little; give at least 7")
    return options


def layer(outputs: int, inputs: int, dtype: torch.dtype) -> Any:
    """A 4-bit layer in eval mode, the same weights each time."""
    torch.manual_seed(0)
    made: Any = bnb.nn.Linear4bit(inputs, outputs, bias=False, compute_dtype=dtype, quant_type="nf4")
    made.weight = bnb.nn.Params4bit(
        (0.02 * torch.randn(outputs, inputs)).to(dtype), requires_grad=False, quant_type="nf4", module=made
    )
    return made.to("cpu").eval()


def rows(dtype: torch.dtype) -> dict[str, list[Product]]:
    """The products of all layers: dequantised, packed, and ours."""
    found: dict[str, list[Product]] = {"dequantised": [], "packed": [], "ours": []}
    for shape in SHAPES:
        plain = layer(*shape, dtype)
        plain.support_avx512bf16_for_cpu = False
        found["dequantised"].append(plain)
        found["packed"].append(layer(*shape, dtype))
        found["ours"].append(base_weight(layer(*shape, dtype)).product)
    return found


@torch.no_grad()
def table(name: str, options: argparse.Namespace) -> str:
    """Markdown: milliseconds of each for every number of tokens, and ours beside the better one."""
    products = rows(DTYPES[name])
    exact_only = "" if name == "bf16" else "; packed computes in bf16, so ours leaves it alone and keeps float32"
    lines = [
        f"{name}, milliseconds of one block{exact_only}:",
        "",
        f"| tokens | dequantised | packed | ours | ours / better (at most {TARGET}) |",
        "|---:|---:|---:|---:|---:|",
    ]
    for tokens in tqdm(options.tokens, desc=name, disable=None):
        inputs = {i: torch.randn(tokens, i).to(DTYPES[name]) for _, i in SHAPES}
        times = measure(products, inputs, options.repeats)
        allowed = ["dequantised", "packed"] if name == "bf16" else ["dequantised"]
        better = min(allowed, key=lambda row: statistics.median(times[row]))
        ratio = statistics.median(a / b for a, b in zip(times["ours"], times[better], strict=True))
        medians = " | ".join(f"{1e3 * statistics.median(times[row]):.2f}" for row in products)
        lines.append(f"| {tokens} | {medians} | {ratio:.2f} |")
    if name != "bf16":
        lines[2] = "| tokens | dequantised | packed | ours | ours / dequantised |"
    return "\n".join([*lines, ""])


def measure(products: dict[str, list[Product]], inputs: dict[int, Tensor], repeats: int) -> dict[str, list[float]]:
    """Seconds of each row in every round, interleaved, the order rotated; after two rounds of warm-up."""
    times: dict[str, list[float]] = {row: [] for row in products}
    names = list(products)
    for turn in range(repeats + 2):
        for row in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            for (_, i), product in zip(SHAPES, products[row], strict=True):
                product(inputs[i])
            if turn >= 2:
                times[row].append(time.perf_counter() - start)
    return times


@torch.no_grad()
def changing_over(repeats: int) -> str:
    """What the first token after a prompt costs, for which ours makes the packed copy that a prompt lets go of."""
    ours = rows(torch.bfloat16)["ours"]
    first, next_ones = [], []
    for _ in range(repeats):
        for tokens, times in ((32, None), (1, first), (1, next_ones)):
            start = time.perf_counter()
            for (_, i), product in zip(SHAPES, ours, strict=True):
                product(torch.ones(tokens, i, dtype=torch.bfloat16))
            if times is not None:
                times.append(time.perf_counter() - start)
    took = [1e3 * statistics.median(times) for times in (first, next_ones)]
    return f"The first token after a prompt takes {took[0]:.2f} ms a block in bf16, the next ones {took[1]:.2f} ms.\n"


if __name__ == "__main__":
    main()
