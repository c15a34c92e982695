"""Decoding and prefill with ONE adapter: bare base (floor), ours and HF PEFT, each used its normal way; interleaved.

    python -m benchmarks.decoding                              # results/decoding.md and .json, all cells
    python -m benchmarks.decoding --storage bf16 --cells 1x1   # a quick look
    python -m benchmarks.decoding --methods lora dora --clock cpu

SmolLM2-135M (--base, or its shape with random weights), r = 16 on all linear layers, or with `lora-qv` on q_proj and
v_proj, PEFT's default for Llama. No routes: the adapter is the active one. "trainable" is an adapter as training leaves
it, in evaluation mode; "frozen" one that was loaded for use. "switched off" is ours inside of `disable_adapter()`.
"packed copies" is ours, trainable, after `add_packed_copies`, and "base, packed copies" the bare base after it; both in
bf16 only. A cell is rows x tokens; with one token, 64 lie in the cache.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from tqdm import tqdm
from transformers import DynamicCache

import peftcore
from benchmarks.machine import machine
from benchmarks.steps import Setting, load, quiet, random_base
from peftcore.bases import add_packed_copies

RESULTS = Path(__file__).parent / "results"
CACHED, RANK = 64, 16
CELLS = ("1x1", "16x1", "32x1", "4x128")
STORAGES = {"fp32": ("fp32", "none"), "bf16": ("bf16", "none"), "nf4": ("bf16", "nf4")}
"""{name: (compute type, storage of the base's weights)}"""
METHODS = ("lora", "lora-qv", "rslora", "dora", "adalora", "ia3")
FLOOR, OFF, PACKED, PACKED_FLOOR = "base", "ours, switched off", "ours, packed copies", "base, packed copies"
SIDES = (FLOOR, "ours, trainable", "ours, frozen", OFF, PACKED, PACKED_FLOOR, "PEFT, trainable", "PEFT, frozen")
TARGETS = {
    "fp32": {"1x1": 1.10, "16x1": 1.08, "32x1": 1.08, "4x128": 1.04},
    "bf16": {"1x1": 1.15, "16x1": 1.12, "32x1": 1.12, "4x128": 1.08},
    "nf4": {"1x1": 1.20, "16x1": 1.15, "32x1": 1.15, "4x128": 1.05},
}
"""Multiples of the bare base that ours is to reach at most."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    options = parse()
    quiet()
    with tempfile.TemporaryDirectory() as scratch:
        base = options.base or random_base(Path(scratch) / "base", options.blocks)
        measured = {
            f"{method} {storage}": measure(base, Path(scratch) / "adapter", method, storage, options)
            for method in options.methods
            for storage in options.storage
        }
    report = {"machine": machine(), "peft": peft.__version__, "clock": options.clock, "measured": measured}
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "decoding.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text = table(report, options.inference_mode)
    (options.folder / "decoding.md").write_text(text, encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.decoding", description=str(__doc__).partition("\n")[0])
    default = Path("artifacts/base")
    parser.add_argument("--base", type=Path, default=default if default.is_dir() else None, help="model folder")
    parser.add_argument("--blocks", type=int, default=30, help="of the random base")
    parser.add_argument("--storage", nargs="+", choices=STORAGES, default=list(STORAGES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["lora"])
    parser.add_argument("--cells", nargs="+", default=list(CELLS), help="rows x tokens, such as 16x1")
    parser.add_argument("--sides", nargs="+", choices=SIDES[1:], default=list(SIDES[1:]))
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds, at least 3")
    parser.add_argument("--inference-mode", action="store_true", help="torch.inference_mode in place of no_grad")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of this process, beside other work")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results are written")
    options = parser.parse_args()
    if options.repeats < 3:
        parser.error(f"--repeats: a median of {options.repeats} says little; give at least 3")
    return options


def measure(base: Path, adapter: Path, method: str, storage: str, options: argparse.Namespace) -> dict[str, Any]:
    """{cell: {side: {ms, ratio to the base, ratio to PEFT}}} of one method on one storage."""
    models = {FLOOR: base_model(base, storage)}
    save_adapter(base, adapter, method, storage)
    for side in options.sides:
        model = base_model(base, storage)
        if side in (PACKED, PACKED_FLOOR) and (storage != "bf16" or not add_packed_copies(model)):
            continue
        if side != PACKED_FLOOR:
            tool = peft if side.startswith("PEFT") else peftcore
            trainable = side.endswith("trainable") or side == PACKED
            model = tool.PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable).eval()
        models[side] = model
    check_equal(models)
    found = {}
    torch.manual_seed(0)
    for cell in tqdm(options.cells, desc=f"{method} {storage}", disable=None):
        rows, tokens = map(int, cell.split("x"))
        ids = torch.randint(models[FLOOR].config.vocab_size, (rows, CACHED if tokens == 1 else tokens))
        cache = filled_cache(models[FLOOR], ids) if tokens == 1 else None
        calls = {side: call_of(model, side, ids, cache, options.inference_mode) for side, model in models.items()}
        found[cell] = rounds(calls, options)
    return found


def base_model(base: Path, storage: str) -> Any:
    dtype, stored = STORAGES[storage]
    return load(Setting(base, dtype, stored)).eval()


def save_adapter(base: Path, folder: Path, method: str, storage: str) -> None:
    """Save an adapter with random weights, made by PEFT, so that both tools read the same one."""
    torch.manual_seed(1)
    dtype, stored = STORAGES[storage]
    targets = ["q_proj", "v_proj"] if method == "lora-qv" else "all-linear"
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": targets}
    config: Any
    if method == "ia3":
        names = ["k_proj", "v_proj", "down_proj"]
        config = peft.IA3Config(task_type="CAUSAL_LM", target_modules=names, feedforward_modules=["down_proj"])
    elif method == "adalora":
        config = peft.AdaLoraConfig(init_r=RANK, target_r=RANK // 2, total_step=1000, lora_alpha=RANK, **common)
    else:
        config = peft.LoraConfig(
            r=RANK, lora_alpha=RANK, use_dora=method == "dora", use_rslora=method == "rslora", **common
        )
    model: Any = peft.get_peft_model(load(Setting(base, dtype, stored)), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_E" in name:
            torch.nn.init.normal_(parameter, std=0.01)
        elif "ia3" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.01)
    model.save_pretrained(str(folder))


@torch.no_grad()
def check_equal(models: dict[str, Any]) -> None:
    """Stop unless each layer of the first block has the same output in all adapted models, and one not the base's.

    Logits would say less: in 16 bits this base makes differences of rounding as large as those that the adapter makes.
    """
    base, *adapted = (model for side, model in models.items() if side not in (OFF, PACKED_FLOOR))
    block, changed = "model.layers.0", False
    for path, layer in base.get_submodule(block).named_modules():
        if not isinstance(layer, torch.nn.Linear):
            continue
        x = torch.randn(2, layer.in_features, dtype=base.dtype)
        plain = layer(x).float()
        outputs = [model.get_submodule(f"base_model.model.{block}.{path}")(x).float() for model in adapted]
        apart = max(float((one - outputs[0]).abs().max()) for one in outputs) / float(plain.abs().max())
        if apart > (1e-5 if base.dtype == torch.float32 else 1e-2):
            raise SystemExit(f"error: the outputs of {path} differ by {apart:.1e} of the largest")
        changed |= not all(torch.equal(one, plain) for one in outputs)
    if adapted and not changed:
        raise SystemExit("error: the adapter changes no layer of the first block, so its time says nothing")


@torch.no_grad()
def filled_cache(base: Any, ids: torch.Tensor) -> DynamicCache:
    """Keys and values of the base for some tokens; of what they are the time of a step does not depend."""
    cache = DynamicCache(config=base.config)
    base(ids, past_key_values=cache, logits_to_keep=1)
    return cache


def call_of(
    model: Any, side: str, ids: torch.Tensor, cache: DynamicCache | None, inference_mode: bool
) -> Callable[[], Any]:
    """A step of one token in each row with a copy of the cache; without a cache, the whole input."""
    mode, cache = torch.inference_mode if inference_mode else torch.no_grad, copy.deepcopy(cache)

    def call() -> None:
        with mode():
            if cache is None:
                model(ids, use_cache=False, logits_to_keep=1)
            else:
                model(ids[:, :1], past_key_values=cache)
                cache.crop(-1)

    if side != OFF:
        return call

    def switched_off() -> None:
        with model.disable_adapter():
            call()

    return switched_off


def rounds(calls: dict[str, Callable[[], Any]], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Time one call of each side a round, the order rotated, after two rounds of warm-up."""
    clock, names = CLOCKS[options.clock], list(calls)
    times: dict[str, list[float]] = {side: [] for side in names}
    for turn in range(-2, options.repeats):
        for side in names[turn % len(names) :] + names[: turn % len(names)]:
            start = clock()
            calls[side]()
            if turn >= 0:
                times[side].append(1e3 * (clock() - start))

    def ratio(side: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(times[side], times[other], strict=True))

    found = {side: {"ms": statistics.median(times[side]), "base": ratio(side, FLOOR)} for side in names}
    for side in names:
        peer = side.replace("ours", "PEFT")
        if side.startswith("ours") and peer in times:
            found[side]["PEFT"] = ratio(side, peer)
    return found


def table(report: dict[str, Any], inference_mode: bool) -> str:
    """Markdown: a row for each method, storage and cell; multiples of the bare base."""
    sides = [
        side for side in SIDES if any(side in cell for cells in report["measured"].values() for cell in cells.values())
    ]
    lines = [
        f"SmolLM2-135M, r = {RANK} on all linear layers (lora-qv: on q_proj and v_proj), one active adapter, "
        f"evaluation mode, {'inference_mode' if inference_mode else 'no_grad'}. Multiples of the bare base, median of "
        f"the ratio within a round; in brackets ours / PEFT. With one token, {CACHED} lie in the cache.",
        "",
        f"| method, storage | rows x tokens | base, ms | {' | '.join(sides[1:])} | target |",
        "|---|---|---:|" + "---:|" * len(sides),
    ]
    for key, cells in report["measured"].items():
        storage = key.split(" ")[1]
        for cell, found in cells.items():
            values = []
            for side in sides[1:]:
                one = found.get(side, {})
                ratio = f"{one['base']:.2f}" if one else "not run"
                values.append(ratio + (f" ({one['PEFT']:.2f})" if "PEFT" in one else ""))
            target = TARGETS[storage].get(cell)
            lines.append(
                f"| {key} | {cell} | {found[FLOOR]['ms']:.1f} | {' | '.join(values)} | "
                f"{'' if target is None else f'{target:.2f}'} |"
            )
    clock = "" if report["clock"] == "wall" else " CPU time of the process."
    end = f"{report['machine']}, peft {report['peft']}.{clock} `python -m benchmarks.decoding`"
    return "\n".join([*lines, "", end]) + "\n"


if __name__ == "__main__":
    main()
