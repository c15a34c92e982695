"""An adapter store under load: thousands of adapters registered, few in the model, requests by Zipf's law.

    python -m benchmarks.store                                        # results/store.md, .json and .png
    python -m benchmarks.store --registered 10 100 --requests 200     # a quick look
    python -m benchmarks.store --draw                                 # table and picture from the last figures

SmolLM2-135M (--base, or its shape with random weights) in bf16; adapters are LoRA of r = 8 on the query and value
projections, each in a directory of its own. Each request asks for one adapter, the k-th most popular with probability
proportional to 1/k^s, and computes one forward of 16 tokens with it. The floor of a miss is reading the file into
memory; PEFT's `load_adapter` and `delete_adapter` do the same work for --peft requests. How it grows: the same
requests with 10 to 2,000 adapters registered, 64 of them in the model at most.
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
from benchmarks.store_picture import draw
from peftcore.files.tensors import WEIGHTS_NAME
from peftcore.routing import AdapterStore

RESULTS = Path(__file__).parent / "results"
RANK, GROWN = 8, 64


def main() -> None:
    options = parse()
    quiet()
    if not options.draw:
        measure(options)
    measured = json.loads((options.folder / "store.json").read_text(encoding="utf-8"))
    (options.folder / "store.md").write_text(text := table(measured), encoding="utf-8")
    draw(measured, options.folder / "store.png")
    print(text)


def measure(options: argparse.Namespace) -> None:
    """Write the figures."""
    with tempfile.TemporaryDirectory(prefix="peftcore-store-") as scratch:
        base = options.base or random_base(Path(scratch) / "base", options.blocks)
        folders = {count: Path(scratch) / str(count) for count in options.registered}
        write_adapters(base, folders)
        most = max(folders)
        found = {
            "runs": [run(base, folders[most], most, limit, options) for limit in options.loaded],
            "growth": [run(base, folder, count, GROWN, options) for count, folder in folders.items()],
            "peft_ms": run_peft(base, folders[most], most, options),
            "registered": most,
            "requests": options.requests,
            "zipf": options.zipf,
            "machine": machine(),
            "peft": peft.__version__,
        }
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "store.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.store", description=str(__doc__).partition("\n")[0])
    default = Path("artifacts/base")
    parser.add_argument("--base", type=Path, default=default if default.is_dir() else None, help="model folder")
    parser.add_argument("--blocks", type=int, default=30, help="of the random base")
    parser.add_argument("--registered", type=int, nargs="+", default=[10, 100, 500, 2000], help="adapters (count)")
    parser.add_argument("--loaded", type=int, nargs="+", default=[16, 64, 256], help="adapters in the model at most")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--zipf", type=float, default=1.0, help="the exponent s")
    parser.add_argument("--peft", type=int, default=20, help="requests that PEFT serves too")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results are written")
    parser.add_argument("--draw", action="store_true", help="table and picture from the last figures")
    options = parser.parse_args()
    if min(*options.registered, options.requests, options.peft, *options.loaded) < 1:
        parser.error("--registered, --requests, --peft and --loaded: give at least 1 of each")
    return options


def resident_bytes() -> int:
    """What this process holds now."""
    return psutil.Process().memory_info().rss


def write_adapters(base: Path, folders: dict[int, Path]) -> None:
    """{count: folder of so many directories}; each has random weights of its own, and the fewer are among the more."""
    count, folder = max(folders.items())
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
    for fewer, other in folders.items():
        if other != folder:
            other.mkdir()
            for number in range(fewer):
                (other / f"a{number}").symlink_to(folder / f"a{number}", target_is_directory=True)


def requests(registered: int, options: argparse.Namespace) -> list[str]:
    """Names by Zipf's law, the same for every run."""
    chance = 1 / numpy.arange(1, registered + 1) ** options.zipf
    drawn = numpy.random.default_rng(0).choice(registered, options.requests, p=chance / chance.sum())
    return [f"a{number}" for number in drawn]


@torch.no_grad()
def run(base: Path, folder: Path, count: int, limit: int, options: argparse.Namespace) -> dict[str, Any]:
    """Serve the requests with at most `limit` adapters in the model."""
    config = peftcore.LoraConfig(r=1, target_modules=["q_proj", "v_proj"])
    model = peftcore.get_peft_model(load(base, "bf16"), config, "none").eval()
    before = resident_bytes()
    store = AdapterStore(model, max_loaded=limit)
    started = time.perf_counter()
    store.register_directory(folder)
    registering = 1e3 * (time.perf_counter() - started)
    registered = resident_bytes()
    tokens = torch.arange(1, 17)[None]
    hits: list[float] = []
    misses: list[float] = []
    forwards: list[float] = []
    for name in tqdm(requests(count, options), desc=f"{count} registered, {limit} loaded", disable=None):
        known = store.statistics()["misses"]
        started = time.perf_counter()
        lease = store.acquire(name)
        spent = 1e3 * (time.perf_counter() - started)
        (misses if store.statistics()["misses"] > known else hits).append(spent)
        started = time.perf_counter()
        model(tokens, adapter_names=lease.name)
        forwards.append(1e3 * (time.perf_counter() - started))
        lease.release()
    counts = store.statistics()
    return {
        "registered": count,
        "registering_ms": registering,
        "loaded": limit,
        "forward_ms": statistics.median(forwards),
        "hit_rate": counts["hit_rate"],
        "evictions": counts["evictions"],
        "hit_ms": statistics.median(hits) if hits else None,
        "miss_ms": statistics.median(misses),
        "miss_p95_ms": float(numpy.quantile(misses, 0.95)),
        "floor_ms": floor(folder, count, options),
        "adapter_bytes": counts["bytes"],
        "registered_bytes": registered - before,
    }


def floor(folder: Path, count: int, options: argparse.Namespace) -> float:
    """ms to read an adapter's file into memory."""
    times = []
    for name in requests(count, options)[:50]:
        started = time.perf_counter()
        for tensor in load_file(folder / name / WEIGHTS_NAME).values():
            tensor.clone()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


@torch.no_grad()
def run_peft(base: Path, folder: Path, count: int, options: argparse.Namespace) -> float:
    """ms that PEFT takes to have one more adapter and one less, with 16 loaded."""
    names = [f"a{number}" for number in range(min(16, count))]
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


def table(measured: dict[str, Any]) -> str:
    """Markdown: a row for each size of the model's share, and how it grows."""
    runs = measured["runs"]
    lines = [
        f"{measured['registered']:,} registered adapters (LoRA r = {RANK} on query and value of SmolLM2-135M, bf16 "
        f"base), {measured['requests']:,} requests by Zipf's law, s = {measured['zipf']:g}. Reading an adapter's file "
        f"into memory, the floor of a miss: {statistics.median(one['floor_ms'] for one in runs):.1f} ms. HF PEFT to "
        f"load one, switch to it and delete one, 16 loaded: {measured['peft_ms']:.0f} ms. Registering them all: "
        f"{runs[0]['registering_ms']:.0f} ms, {runs[0]['registered_bytes'] / 2**20:.1f} MiB.",
        "",
        "| in the model | hit rate | evictions | hit, ms | miss, ms | miss p95, ms | miss / floor | adapters, MiB |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in runs:
        lines.append(
            f"| {one['loaded']} | {one['hit_rate']:.1%} | {one['evictions']:,} | "
            f"{'–' if one['hit_ms'] is None else format(one['hit_ms'], '.3f')} | {one['miss_ms']:.1f} | "
            f"{one['miss_p95_ms']:.1f} | {one['miss_ms'] / one['floor_ms']:.1f} | {one['adapter_bytes'] / 2**20:.0f} |"
        )
    lines += [
        "",
        f"| registered, {GROWN} in the model | hit rate | hit, ms | miss, ms | forward of 16 tokens, ms |",
        "|---:|---:|---:|---:|---:|",
    ]
    for one in measured["growth"]:
        lines.append(
            f"| {one['registered']:,} | {one['hit_rate']:.1%} | {one['hit_ms']:.3f} | {one['miss_ms']:.1f} | "
            f"{one['forward_ms']:.1f} |"
        )
    return (
        "\n".join([*lines, "", f"{measured['machine']}, peft {measured['peft']}. `python -m benchmarks.store`"]) + "\n"
    )


if __name__ == "__main__":
    main()
