"""Forward of a batch whose rows have different adapters: bare base (floor), ours, HF PEFT; interleaved.

    python -m benchmarks.routing                  # results/routing.md, .json and .png
    python -m benchmarks.routing --dtypes bf16 --modes decode --repeats 15 --ours   # a quick look, without PEFT
    python -m benchmarks.routing --draw           # table and picture from the last figures

SmolLM2-135M (--base, or its shape with random weights) with LoRA on all 210 linear layers. decode: one token for each
of 16 rows, 64 tokens in the cache; prefill: 128 tokens for each of 16 rows. How it grows: adapters in a batch of 64
rows, rank, and adapters loaded.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache

import peftcore
from benchmarks.machine import machine
from benchmarks.routing_picture import draw
from benchmarks.steps import DTYPES, quiet, random_base

RESULTS = Path(__file__).parent / "results"
FLOOR, OURS, PEFT = "floor", "ours", "PEFT"
ROWS, CACHED, PROMPT, RANK = 16, 64, 128, 8
MODES = ("decode", "prefill")
CASES: dict[str, int | None] = {"1 for all": 1, "4": 4, "16": 16, "disabled": None}
"""Adapters among the rows; None: adapters are loaded and switched off."""
TARGETS = {
    ("decode", "16"): {"fp32": 1.4, "bf16": 1.55},
    ("decode", "4"): {"fp32": 1.2, "bf16": 1.4},
    ("decode", "1 for all"): {"fp32": 1.13, "bf16": 1.3},
    ("decode", "disabled"): {"fp32": 1.05, "bf16": 1.05},
    ("prefill", "16"): {"fp32": 1.2, "bf16": 1.3},
}
"""Multiples of the bare base that ours is to reach at most."""
GROWTH = {"adapters in 64 rows": (1, 2, 4, 8, 16, 32, 64), "rank": (4, 8, 16, 32, 64), "adapters loaded": (16, 64, 256)}


def main() -> None:
    options = parse()
    quiet()
    if not options.draw:
        with tempfile.TemporaryDirectory() as scratch:
            measured = measure(options, options.base or random_base(Path(scratch) / "base", options.blocks))
        options.folder.mkdir(parents=True, exist_ok=True)
        (options.folder / "routing.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    measured = json.loads((options.folder / "routing.json").read_text(encoding="utf-8"))
    text = table(measured)
    (options.folder / "routing.md").write_text(text, encoding="utf-8")
    draw(measured, options.folder / "routing.png")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.routing", description=str(__doc__).partition("\n")[0])
    default = Path("artifacts/base")
    parser.add_argument("--base", type=Path, default=default if default.is_dir() else None, help="model folder")
    parser.add_argument("--blocks", type=int, default=30, help="of the random base")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--repeats", type=int, default=11, help="timed rounds, at least 3")
    parser.add_argument("--growth", nargs="*", choices=GROWTH, default=list(GROWTH), help="what to grow; none: nothing")
    parser.add_argument("--ours", action="store_true", help="leave PEFT out")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results are written")
    parser.add_argument("--draw", action="store_true", help="table and picture from the last figures")
    options = parser.parse_args()
    if options.repeats < 3:
        parser.error(f"--repeats: a median of {options.repeats} says little; give at least 3")
    return options


def measure(options: argparse.Namespace, base: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"cases": {}, "growth": {}, "machine": machine(), "peft": peft.__version__}
    for dtype in options.dtypes:
        sides = {FLOOR: load(base, dtype), OURS: ours(load(base, dtype), ROWS)}
        if not options.ours:
            sides[PEFT] = theirs(load(base, dtype), sides[OURS], ROWS)
        check_equal(sides, dtype)
        for mode in options.modes:
            for case, count in tqdm(CASES.items(), desc=f"{mode} {dtype}", disable=None):
                names = None if count is None else [f"a{row % count}" for row in range(ROWS)]
                found["cases"][f"{mode} {case} {dtype}"] = rounds(sides, mode, ROWS, names, options.repeats)
    for axis in options.growth:
        for point in tqdm(GROWTH[axis], desc=axis, disable=None):
            found["growth"].setdefault(axis, {})[point] = grown(base, axis, point, options)
    return found


# -- models ----------------------------------------------------------------------------------------------------------


def load(base: Path, dtype: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=DTYPES[dtype], local_files_only=True).eval()


def ours(model: Any, count: int, rank: int = RANK) -> Any:
    """With so many adapters "a0", "a1", ... whose weights are random."""
    for number in range(count):
        torch.manual_seed(number)
        config = peftcore.LoraConfig(
            r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=False, inference_mode=True
        )
        if number:
            model.add_adapter(f"a{number}", config)
        else:
            model = peftcore.get_peft_model(model, config, "a0")
    return model.eval()


def theirs(model: Any, ours: Any, count: int) -> Any:
    """The same adapters in PEFT, from our directories."""
    with tempfile.TemporaryDirectory() as scratch:
        ours.save_pretrained(scratch)
        found = peft.PeftModel.from_pretrained(model, Path(scratch) / "a0", adapter_name="a0")
        for number in range(1, count):
            found.load_adapter(Path(scratch) / f"a{number}", adapter_name=f"a{number}")
    return found.eval()


@torch.no_grad()
def check_equal(sides: dict[str, Any], dtype: str) -> None:
    """Stop unless both compute the same for a mixed batch (fp32; bf16 differs by rounding however it is done)."""
    if PEFT not in sides or dtype != "fp32":
        return
    tokens = torch.arange(1, 33).view(4, 8)
    given = {"input_ids": tokens, "adapter_names": ["a0", "a1", "__base__", "a1"]}
    difference = (sides[OURS](**given).logits - sides[PEFT](**given).logits).abs().max().item()
    if difference > 1e-3:
        raise SystemExit(f"ours and PEFT differ by {difference:.2g} on a mixed batch, so times would say nothing")


# -- rounds ----------------------------------------------------------------------------------------------------------


def rounds(
    sides: dict[str, Any], mode: str, rows: int, names: Sequence[str] | None, repeats: int
) -> dict[str, dict[str, float]]:
    """{side: {"ms": median, "floor": median ratio within a round}}; names: of the rows, None: switched off."""
    calls = {name: call_of(model, mode, rows, names, name == FLOOR) for name, model in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for turn in range(repeats + 2):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            started = time.perf_counter()
            calls[name]()
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - started))
    ratios = {name: [one / floor for one, floor in zip(times[name], times[FLOOR], strict=True)] for name in sides}
    return {name: {"ms": statistics.median(times[name]), "floor": statistics.median(ratios[name])} for name in sides}


def call_of(model: Any, mode: str, rows: int, names: Sequence[str] | None, bare: bool) -> Callable[[], Any]:
    torch.manual_seed(0)
    length = PROMPT if mode == "prefill" else CACHED
    tokens = torch.randint(model.config.vocab_size, (rows, length))
    given: dict[str, Any] = {} if bare or names is None else {"adapter_names": list(names)}
    cache = DynamicCache(config=model.config)
    if mode == "decode":
        with torch.no_grad():
            model(tokens, cache=cache)

    @torch.no_grad()
    def call() -> None:
        if mode == "prefill":
            model(tokens, use_cache=False, logits_to_keep=1, **given)
        else:
            model(tokens[:, :1], cache=cache, **given)
            cache.crop(-1)

    if bare or names is not None:
        return call

    def switched_off() -> None:
        with model.disable_adapter():
            call()

    return switched_off


def grown(base: Path, axis: str, point: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """bf16 decoding at one point of an axis, ours and the floor."""
    dtype = "bf16"
    if axis == "adapters in 64 rows":
        rows, loaded, used, rank = 64, point, point, RANK
    elif axis == "rank":
        rows, loaded, used, rank = ROWS, ROWS, ROWS, point
    else:
        rows, loaded, used, rank = ROWS, point, ROWS, RANK
    sides: dict[str, nn.Module] = {FLOOR: load(base, dtype), OURS: ours(load(base, dtype), loaded, rank)}
    return rounds(sides, "decode", rows, [f"a{row % used}" for row in range(rows)], options.repeats)


# -- the table -------------------------------------------------------------------------------------------------------


def table(measured: dict[str, Any]) -> str:
    """Markdown: a row for each case, multiples of the bare base."""
    lines = [
        f"Forward of {ROWS} rows, SmolLM2-135M, LoRA r = {RANK} on all linear layers, {ROWS} adapters loaded; decode: "
        f"one token a row, {CACHED} in the cache; prefill: {PROMPT} tokens a row. Multiples of the bare base, median "
        "of the ratio within a round.",
        "",
        "| | adapters among the rows | type | base, ms | ours | PEFT | target |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for key, found in measured["cases"].items():
        mode, rest = key.split(" ", 1)
        case, dtype = rest.rsplit(" ", 1)
        target = TARGETS.get((mode, case), {}).get(dtype)
        other = f"{found[PEFT]['floor']:.2f}" if PEFT in found else "–"
        lines.append(
            f"| {mode} | {case} | {dtype} | {found[FLOOR]['ms']:.1f} | {found[OURS]['floor']:.2f} | {other} | "
            f"{'' if target is None else f'{target:g}'} |"
        )
    for axis, points in measured["growth"].items():
        lines += ["", f"bf16 decode by {axis}: " + ", ".join(f"{p}: {f[OURS]['floor']:.2f}" for p, f in points.items())]
    if note := measured.get("note"):  # where figures of several runs were put together, what has to be said of them
        lines += ["", note]
    return (
        "\n".join([*lines, "", f"{measured['machine']}, peft {measured['peft']}. `python -m benchmarks.routing`"])
        + "\n"
    )


if __name__ == "__main__":
    main()
