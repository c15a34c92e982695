"""Products of float32 matrices on a CPU by PyTorch's two libraries, and the one that ours takes.

    python -m benchmarks.float32_products     # a minute; results/float32_products.md

The 210 linear layers of SmolLM2-135M's shape one after the other, random weights, so that every weight comes from
memory. "MKL" is `F.linear`, "oneDNN" the operation that `peftcore.bases.onednn` calls. Where PyTorch has no MKL,
`F.linear` calls another library.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.machine import machine
from benchmarks.steps import quiet
from peftcore.bases import onednn

RESULTS = Path(__file__).parent / "results"
SHAPES = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
"""(outputs, inputs) of q, k, v, o, gate, up and down."""
BLOCKS = 30
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 512]
Product = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    options = parse()
    quiet()
    if not onednn.is_usable():
        raise SystemExit("error: this PyTorch has no oneDNN, or its operation has another interface")
    products: dict[str, Product] = {"MKL": F.linear, "oneDNN": onednn.product, "ours": onednn.linear}
    report = "\n".join([table(products, options), errors(products), f"Measured on {machine()}."])
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "float32_products.md").write_text(report + "\n", encoding="utf-8")
    print(report)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.float32_products", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--rows", type=lambda text: [int(t) for t in text.split(",")], default=ROWS)
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds, at least 7")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results are written")
    options = parser.parse_args()
    if options.repeats < 7:
        parser.error(f"--repeats: a median of {options.repeats} says little; give at least 7")
    return options


@torch.no_grad()
def table(products: dict[str, Product], options: argparse.Namespace) -> str:
    """Return milliseconds of all layers for each number of rows with one token, as Markdown."""
    weights = [0.02 * torch.randn(shape) for _ in range(BLOCKS) for shape in SHAPES]
    chosen = f"oneDNN for weights of {onednn.LEAST_ELEMENTS:,} elements or more" if onednn.mkl_is_slow() else "MKL"
    lines = [
        f"Milliseconds of {len(weights)} layers in float32, {torch.get_num_threads()} threads. For up to "
        f"{onednn.MOST_ROWS} rows of one token ours takes here {chosen}, and MKL for everything else.",
        "",
        "| rows | " + " | ".join(products) + " | oneDNN / MKL | ours / MKL |",
        "|---:" * (len(products) + 3) + "|",
    ]
    for rows in tqdm(options.rows, desc="rows", disable=None):
        inputs = {i: torch.randn(rows, 1, i) for _, i in SHAPES}
        times: dict[str, list[float]] = {name: [] for name in products}
        names = list(products)
        for turn in range(options.repeats + 2):  # two rounds of warm-up
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                product, start = products[name], time.perf_counter()
                for weight in weights:
                    product(inputs[weight.shape[1]], weight)
                if turn >= 2:
                    times[name].append(time.perf_counter() - start)
        medians = [f"{1e3 * statistics.median(seconds):.1f}" for seconds in times.values()]
        ratios = [
            f"{statistics.median(a / b for a, b in zip(times[name], times['MKL'], strict=True)):.2f}"
            for name in ("oneDNN", "ours")
        ]
        lines.append(f"| {rows} | {' | '.join([*medians, *ratios])} |")
    return "\n".join([*lines, ""])


@torch.no_grad()
def errors(products: dict[str, Product]) -> str:
    """Return the rounding of each product: the norm of its difference from float64, by the norm of the product."""
    torch.manual_seed(0)
    found: dict[str, list[float]] = {name: [] for name in products}
    for shape in SHAPES:
        weight, x = torch.randn(shape), torch.randn(32, 1, shape[1])
        exact = x.double() @ weight.double().T
        for name, product in products.items():
            found[name].append(float((product(x, weight) - exact).norm() / exact.norm()))
    listed = ", ".join(f"{name} {min(values):.1e} to {max(values):.1e}" for name, values in found.items())
    return f"Rounding for 32 rows, by the norm of the output: {listed}.\n"


if __name__ == "__main__":
    main()
