"""An adapter store under load: thousands of adapters registered, few in the model, requests by Zipf's law.

    python -m benchmarks.store                                  # results/store.md and .json
    python -m benchmarks.store --registered 100 --requests 200  # a quick look

SmolLM2-135M (--base, or its shape with random weights) in bf16; adapters are LoRA of r = 8 on the query and value
projections, each in a directory of its own. Each request asks for one adapter, the k-th most popular with probability
proportional to 1/k^s, and computes one forward of 16 tokens with it. The floor of a miss is reading the file into
memory; PEFT's `load_adapter` and `delete_adapter` do the same work for --peft requests.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy
import peft
import psutil
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import peftcore
from benchmarks.machine import machine
from benchmarks.routing import load
from benchmarks.steps import quiet, random_base
from peftcore.routing import AdapterStore
from peftcore.tensors import WEIGHTS_NAME

RESULTS = Path(__file__).parent / "results"
RANK = 8


def main() -> None:
    options = parse()
    quiet()
    with tempfile.TemporaryDirectory(prefix="peftcore-store-") as scratch:
        base = options.base or random_base(Path(scratch) / "base", options.blocks)
        folder = Path(scratch) / "adapters"
        write_adapters(base, folder, options.registered)
        measured = [run(base, folder, limit, options) for limit in options.loaded]
        theirs = run_peft(base, folder, options)
    report(options, measured, theirs)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.store", description=str(__doc__).partition("\n")[0])
    default = Path("artifacts/base")
    parser.add_argument("--base", type=Path, default=default if default.is_dir() else None, help="model folder")
    parser.add_argument("--blocks", type=int, default=30, help="of the random base")
    parser.add_argument("--registered", type=int, default=2000, help="adapters (count)")
    parser.add_argument("--loaded", type=int, nargs="+", default=[16, 64, 256], help="adapters in the model at most")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--zipf", type=float, default=1.0, help="the exponent s")
    parser.add_argument("--peft", type=int, default=20, help="requests that PEFT serves too")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results are written")
    options = parser.parse_args()
    if min(options.registered, options.requests, options.peft, *options.loaded) < 1:
        parser.error("--registered, --requests, --peft and --loaded: give at least 1 of each")
    return options


def resident_bytes() -> int:
    """What this process holds now."""
    return psutil.Process().memory_info().rss


def write_adapters(base: Path, folder: Path, count: int) -> None:
    """So many directories, each with random weights of its own."""
    config = peftcore.LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peftcore.get_peft_model(load(base, "bf16"), config)
    model.save_pretrained(folder / "a0")
    tensors = load_file(folder / "a0" / WEIGHTS_NAME)
    for number in tqdm(range(count), desc="writing adapters", disable=None):
        own = folder / f"a{number}"
        own.mkdir(exist_ok=True)
        if number:
            shutil.copy(folder / "a0" / "adapter_config.json", own)
        torch.manual_seed(number)
        save_file({key: 0.02 * torch.randn_like(t) for key, t in tensors.items()}, own / WEIGHTS_NAME)
        (own / "SHA256SUMS").unlink(missing_ok=True)


def requests(options: argparse.Namespace) -> list[str]:
    """Names by Zipf's law, the same for every run."""
    chance = 1 / numpy.arange(1, options.registered + 1) ** options.zipf
    drawn = numpy.random.default_rng(0).choice(options.registered, options.requests, p=chance / chance.sum())
    return [f"a{number}" for number in drawn]


@torch.no_grad()
def run(base: Path, folder: Path, limit: int, options: argparse.Namespace) -> dict[str, Any]:
    """Serve the requests with at most `limit` adapters in the model."""
    config = peftcore.LoraConfig(r=1, target_modules=["q_proj", "v_proj"])
    model = peftcore.get_peft_model(load(base, "bf16"), config, "none").eval()
    before = resident_bytes()
    store = AdapterStore(model, max_loaded=limit)
    store.register_directory(folder)
    registered = resident_bytes()
    tokens = torch.arange(1, 17)[None]
    hits: list[float] = []
    misses: list[float] = []
    for name in tqdm(requests(options), desc=f"{limit} loaded", disable=None):
        known = store.statistics()["misses"]
        started = time.perf_counter()
        lease = store.acquire(name)
        spent = 1e3 * (time.perf_counter() - started)
        (misses if store.statistics()["misses"] > known else hits).append(spent)
        model(tokens, adapter_names=lease.name)
        lease.release()
    counts = store.statistics()
    return {
        "loaded": limit,
        "hit_rate": counts["hit_rate"],
        "evictions": counts["evictions"],
        "hit_ms": statistics.median(hits) if hits else None,
        "miss_ms": statistics.median(misses),
        "miss_p95_ms": float(numpy.quantile(misses, 0.95)),
        "floor_ms": floor(folder, options),
        "adapter_bytes": counts["bytes"],
        "registered_bytes": registered - before,
    }


def floor(folder: Path, options: argparse.Namespace) -> float:
    """ms to read an adapter's file into memory."""
    times = []
    for name in requests(options)[:50]:
        started = time.perf_counter()
        for tensor in load_file(folder / name / WEIGHTS_NAME).values():
            tensor.clone()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


@torch.no_grad()
def run_peft(base: Path, folder: Path, options: argparse.Namespace) -> float:
    """ms that PEFT takes to have one more adapter and one less, with 16 loaded."""
    names = [f"a{number}" for number in range(min(16, options.registered))]
    model: Any = peft.PeftModel.from_pretrained(load(base, "bf16"), folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    times = []
    for turn in range(options.peft):
        started = time.perf_counter()
        model.load_adapter(folder / names[0], adapter_name=f"more{turn}")
        model.set_adapter(f"more{turn}")
        model.delete_adapter(f"more{turn - 1}" if turn else names[-1])
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def report(options: argparse.Namespace, measured: list[dict[str, Any]], theirs: float) -> None:
    """Write the figures and the table, and print the table."""
    lines = [
        f"{options.registered:,} registered adapters (LoRA r = {RANK} on query and value of SmolLM2-135M, bf16 base), "
        f"{options.requests:,} requests by Zipf's law, s = {options.zipf:g}. Reading an adapter's file into memory, "
        f"the floor of a miss: {statistics.median(one['floor_ms'] for one in measured):.1f} ms. HF PEFT to load one, "
        f"switch to it and delete one, 16 loaded: {theirs:.0f} ms. Registering them all: "
        f"{measured[0]['registered_bytes'] / 2**20:.1f} MiB.",
        "",
        "| in the model | hit rate | evictions | hit, ms | miss, ms | miss p95, ms | miss / floor | adapters, MiB |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in measured:
        lines.append(
            f"| {one['loaded']} | {one['hit_rate']:.1%} | {one['evictions']:,} | "
            f"{'–' if one['hit_ms'] is None else format(one['hit_ms'], '.3f')} | {one['miss_ms']:.1f} | "
            f"{one['miss_p95_ms']:.1f} | {one['miss_ms'] / one['floor_ms']:.1f} | {one['adapter_bytes'] / 2**20:.0f} |"
        )
    lines += ["", f"{machine()}, peft {peft.__version__}. `python -m benchmarks.store`"]
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "store.json").write_text(json.dumps({"runs": measured, "peft_ms": theirs}, indent=1) + "\n")
    (options.folder / "store.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
