"""What it costs to make one LoRA of two, by HF PEFT's ways to do it; ours and PEFT, interleaved.

    python -m benchmarks.combine               # about two minutes: results/combine.md

Two adapters (r = 8) on all linear layers of SmolLM2-135M (--base, or its shape with random weights) in float32, since
PEFT keeps what `cat` makes in the base's type; one thread. A call adds the combined adapter to the model; taking it out
again is not timed. The floor is arithmetic alone: the QR decompositions of the stacked factors and the SVD of the small
core, layer by layer; it has no meaning but for svd.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from tqdm import tqdm

import peftcore
from benchmarks.lifecycle_rounds import smollm
from benchmarks.machine import machine
from benchmarks.steps import quiet
from peftcore.injection.adapter_set import adapter_set

RESULTS = Path(__file__).parent / "results"
RANK = 8
WEIGHTS = [0.7, 0.4]
KINDS: dict[str, dict[str, Any]] = {"svd": {}, "cat": {}, "linear": {}, "ties": {"density": 0.3}}
TARGET = 1 / 50
"""Largest ratio of our time to PEFT's for svd."""
SAME = 1e-4
"""Largest difference of the two results, relative to the largest element of a layer's ΔW (float32)."""


def main() -> None:
    options = parse()
    quiet()
    torch.set_num_threads(1)
    base = smollm(options.base).float()
    with tempfile.TemporaryDirectory() as scratch:
        ours, theirs = adapted(base, Path(scratch))
    report = table(measure(ours, theirs, options.repeats), len(adapter_set(ours).adapters("a")))
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "combine.md").write_text(report, encoding="utf-8")
    print(report)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.combine", description=str(__doc__).partition("\n")[0])
    default = Path("artifacts/base")
    parser.add_argument("--base", type=Path, default=default if default.is_dir() else None, help="model to adapt")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds, at least 7")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results are written")
    options = parser.parse_args()
    if options.repeats < 7:
        parser.error(f"--repeats: a median of {options.repeats} says little; give at least 7")
    return options


def adapted(base: nn.Module, scratch: Path) -> tuple[Any, Any]:
    """Our model and PEFT's with the same two adapters, "a" and "b"."""
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config, "a")
    theirs.add_adapter("b", copy.deepcopy(config))
    torch.manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.05)
    theirs.save_pretrained(str(scratch))
    ours = peftcore.PeftModel.from_pretrained(base, scratch / "a", "a")
    ours.load_adapter(scratch / "b", "b")
    return ours, theirs


# -- measuring ---------------------------------------------------------------------------------------------------


def measure(ours: Any, theirs: Any, repeats: int) -> dict[str, dict[str, list[float]]]:
    """{kind: {side: seconds of each round}}; a first round warms up and compares what both sides made."""
    times: dict[str, dict[str, list[float]]] = {kind: {"floor": [], "ours": [], "PEFT": []} for kind in KINDS}
    for turn in tqdm(range(repeats + 1), desc="rounds", disable=None):
        for kind, options in KINDS.items():
            sides = {"ours": ours, "PEFT": theirs}
            for side in ("ours", "PEFT") if turn % 2 else ("PEFT", "ours"):
                model = sides[side]
                took = timed(
                    lambda m=model, k=kind, o=options: m.add_weighted_adapter(["a", "b"], WEIGHTS, "m", k, **o)
                )
                if turn:
                    times[kind][side].append(took)
            if not turn:
                check_equal(kind, ours, theirs)
            for model in sides.values():
                model.delete_adapter("m")
        if turn:
            times["svd"]["floor"].append(timed(lambda: floor(ours)))
    return times


def timed(call: Callable[[], Any]) -> float:
    """Seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@torch.no_grad()
def floor(model: Any) -> None:
    """QR of the stacked factors and SVD of the core, of every layer."""
    layers = adapter_set(model).layers.values()
    for one, other in ((site.adapters["a"], site.adapters["b"]) for site in layers):
        a, b = (
            torch.cat([one.lora_A_weight, other.lora_A_weight]),
            torch.cat([one.lora_B_weight, other.lora_B_weight], 1),
        )
        q_b, r_b = torch.linalg.qr(b)
        q_a, r_a = torch.linalg.qr(a.T)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T)
        _ = q_b @ (u[:, :RANK] * s[:RANK]), vh[:RANK] @ q_a.T


def check_equal(kind: str, ours: Any, theirs: Any) -> None:
    """Stop unless both made the same; what is wrong may well be fast."""
    for path, adapter in adapter_set(ours).adapters("m").items():
        expected: Tensor = theirs.base_model.model.get_submodule(path).get_delta_weight("m")
        if (adapter.delta_weight() - expected).abs().max() > SAME * expected.abs().max():
            raise SystemExit(f"error: {kind}: ours and PEFT make different adapters at {path}")


# -- report ------------------------------------------------------------------------------------------------------


def table(times: dict[str, dict[str, list[float]]], layers: int) -> str:
    """Markdown; ratios are medians over the rounds of the ratio within a round."""
    rounds = len(times["svd"]["ours"])
    lines = [
        f"add_weighted_adapter of two LoRAs (r = {RANK}) on {layers} linear layers; medians of {rounds} rounds.",
        "",
        "| kind | floor, ms | ours, ms | PEFT, ms | PEFT / ours | ours / floor |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for kind, sides in times.items():
        ms = {side: 1e3 * statistics.median(own) for side, own in sides.items() if own}
        least, over = (f"{ms['floor']:.0f}", f"{ratio(sides, 'ours', 'floor'):.2f}") if "floor" in ms else ("", "")
        times_less = ratio(sides, "PEFT", "ours")
        lines.append(f"| {kind} | {least} | {ms['ours']:.0f} | {ms['PEFT']:,.0f} | {times_less:.1f} | {over} |")
    reached = "reached" if ratio(times["svd"], "ours", "PEFT") <= TARGET else "missed"
    lines += ["", f"Target for svd, ours at most 1/{1 / TARGET:.0f} of PEFT's time: {reached}."]
    return "\n".join([*lines, "", f"Measured on {machine()}."]) + "\n"


def ratio(sides: dict[str, list[float]], one: str, other: str) -> float:
    """Of two sides of the same rounds."""
    return statistics.median(a / b for a, b in zip(sides[one], sides[other], strict=True))


if __name__ == "__main__":
    main()
