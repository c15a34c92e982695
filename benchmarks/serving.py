"""Throughput and latency of `peftcore serve` over HTTP on loopback: one adapter for all clients against one for each.

    python -m benchmarks.serving                           # results/serving.md
    python -m benchmarks.serving --rounds 1 --tokens 16    # a quick look

The server is a process of its own; the clients are threads of this one. Each asks again as soon as it is answered:
a prompt of random tokens, greedy, streamed. The cases take turns within a round, so a load that lasts longer cancels.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import httpx
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import peftcore
from benchmarks.machine import machine
from benchmarks.steps import quiet

RESULTS = Path(__file__).parent / "results"
CLIENTS, RANK, TARGET = 16, 8, 0.70
BASE, ONE, EACH, SINGLE = "the base alone", "1 adapter", "16 adapters", "16 adapters, one client"
CASES = {BASE: (CLIENTS, 0), ONE: (CLIENTS, 1), EACH: (CLIENTS, CLIENTS), SINGLE: (1, CLIENTS)}
"""(clients at a time, adapters that they ask for)"""


@dataclass(frozen=True)
class Answer:
    """One request, in seconds. tokens: generated (count)."""

    first: float
    whole: float
    tokens: int


@dataclass(frozen=True)
class Round:
    """One case in one round."""

    answers: list[Answer]
    seconds: float

    @property
    def throughput(self) -> float:
        """Tokens a second, of all clients together."""
        return sum(answer.tokens for answer in self.answers) / self.seconds


def main() -> None:
    options = parse()
    quiet()
    with tempfile.TemporaryDirectory() as scratch:
        adapters = make_adapters(options.base, Path(scratch))
        with server(options.base, adapters, options.dtype) as url:
            rounds = [measure(url, options) for _ in tqdm(range(options.rounds + 1), disable=None)][1:]
    options.folder.mkdir(parents=True, exist_ok=True)
    text = table(rounds, options)
    (options.folder / "serving.md").write_text(text)
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.serving", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--base", type=Path, default=Path("artifacts/base"), help="model folder with its tokenizer")
    parser.add_argument("--dtype", default="auto", help="of the base")
    parser.add_argument("--rounds", type=int, default=7, help="after one of warm-up")
    parser.add_argument("--requests", type=int, default=1, help="of each client in a round")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer at most")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the result is written")
    options = parser.parse_args()
    if not (options.base / "tokenizer.json").is_file():
        parser.error(f"--base: {options.base} holds no tokenizer.json; give a model folder with its tokenizer")
    return options


def make_adapters(base: Path, folder: Path) -> Path:
    """Sixteen LoRAs with random weights, small enough that answers stay long."""
    model = AutoModelForCausalLM.from_pretrained(base, local_files_only=True)
    config = peftcore.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", inference_mode=True)
    model = peftcore.get_peft_model(model, config, "a0")
    for number in range(1, CLIENTS):
        model.add_adapter(f"a{number}", config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.002)
    model.save_pretrained(folder)
    return folder


@contextmanager
def server(base: Path, adapters: Path, dtype: str) -> Iterator[str]:
    """A server process; gives its address."""
    command = [sys.executable, "-W", "ignore", "-c", "from flows.cli import app; app()", "serve", "--port", "0"]
    command += ["--base", str(base), "--adapters", str(adapters), "--name", "base", "--dtype", dtype]
    process = subprocess.Popen([*command, "--max-batch", str(CLIENTS)], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"serving .* on (http://\S+)", line):
                yield found.group(1)
                return
        raise SystemExit("the server did not start; try `peftcore serve` by hand")
    finally:
        process.terminate()
        process.wait()
        process.stderr.close()


def measure(url: str, options: argparse.Namespace) -> dict[str, Round]:
    """Every case once."""
    with httpx.Client(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        return {case: run(client, *shape, options) for case, shape in CASES.items()}


def run(client: httpx.Client, clients: int, adapters: int, options: argparse.Namespace) -> Round:
    def work(number: int) -> list[Answer]:
        model = f"a{number % adapters}" if adapters else "base"
        chance = random.Random(number)
        prompts = [chance.choices(range(10, 250), k=options.prompt) for _ in range(options.requests)]
        return [ask(client, model, prompt, options.tokens) for prompt in prompts]

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for found in pool.map(work, range(clients)) for answer in found]
    return Round(answers, time.perf_counter() - started)


def ask(client: httpx.Client, model: str, prompt: Sequence[int], tokens: int) -> Answer:
    given = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    given |= {"stream": True, "stream_options": {"include_usage": True}}
    started = time.perf_counter()
    first, counted = 0.0, 0
    with client.stream("POST", "/v1/completions", json=given) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            first = first or time.perf_counter() - started
            if line.startswith("data: {"):
                usage = json.loads(line.removeprefix("data: ")).get("usage")
                counted = usage["completion_tokens"] if usage else counted
    return Answer(first, time.perf_counter() - started, counted)


# -- the table -------------------------------------------------------------------------------------------------------


def table(rounds: Sequence[dict[str, Round]], options: argparse.Namespace) -> str:
    """Markdown: a row for each case."""
    lines = [
        f"`peftcore serve` over HTTP on loopback, {options.base.resolve().name} in {options.dtype}, LoRA r = {RANK} on "
        f"all linear layers; prompts of {options.prompt} tokens, answers of {options.tokens} at most, streamed. "
        f"Throughput: of all clients together; against {ONE}: median (range) of the ratio within a round.",
        "",
        f"| adapters among the clients | clients | tokens/s | / {ONE} | target | latency p50, p95, s "
        "| first token p50, p95, s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for case, (clients, _) in CASES.items():
        found = [one[case] for one in rounds]
        answers = [answer for one in found for answer in one.answers]
        ratios = sorted(one[case].throughput / one[ONE].throughput for one in rounds)
        lines.append(
            f"| {case} | {clients} | {statistics.median(one.throughput for one in found):.1f} | "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | "
            f"{f'≥ {TARGET:.2f}' if case == EACH else ''} | {percentiles([a.whole for a in answers])} | "
            f"{percentiles([a.first for a in answers])} |"
        )
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return "\n".join([*lines, "", f"{machine()}, server with {threads} threads. `python -m benchmarks.serving`"]) + "\n"


def percentiles(seconds: Sequence[float]) -> str:
    """The median and the 95th percentile."""
    ordered = sorted(seconds)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        below = list(pairwise([*ordered, ordered[-1]]))[int(place)]
        return below[0] + (below[1] - below[0]) * (place - int(place))

    return f"{at(0.5):.2f}, {at(0.95):.2f}"


if __name__ == "__main__":
    main()
