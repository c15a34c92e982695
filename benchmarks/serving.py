"""Throughput and latency of `peftcore serve` over HTTP, beside llama.cpp's server and a bare loop of the forward.

    python -m benchmarks.serving                           # results/serving.md
    python -m benchmarks.serving --rounds 1 --tokens 16    # a quick look
    python -m benchmarks.serving --no-peer                 # without llama.cpp

Each server is a process of its own; the clients are threads of this one. A client asks again as soon as it is answered:
a prompt of random tokens, greedy, streamed. Each round has other prompts, so that no server has seen them before; only
the case with a system prompt repeats the beginning of its prompts. llama.cpp (package xllamacpp) serves the exported
GGUF in float16 with the exported adapters, as many slots and as many threads. All cases take turns within a round, so
load that lasts longer cancels in their ratios.
"""

import argparse
import importlib.util
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import peftcore
from benchmarks.machine import machine
from benchmarks.steps import quiet
from peftcore.serving.service import load_base

RESULTS = Path(__file__).parent / "results"
CLIENTS, RANK = 16, 8
SYSTEM_PROMPT = 192
"""Tokens that all prompts of one case have in common (count)."""
LOOP = "a loop of the base's forward, 16 rows"
BASE, ONE, EACH = "the base alone", "1 adapter", "16 adapters"
SYSTEM, SINGLE = "1 adapter, a system prompt of 192 tokens", "16 adapters, one client"
PEER_BASE, PEER_ONE, PEER_EACH = (f"llama.cpp: {case}" for case in (BASE, ONE, EACH))


@dataclass(frozen=True)
class Case:
    """Clients at a time, adapters that they ask for, and tokens that all prompts begin with (counts)."""

    clients: int
    adapters: int
    common: int = 0


CASES = {
    BASE: Case(CLIENTS, 0),
    ONE: Case(CLIENTS, 1),
    EACH: Case(CLIENTS, CLIENTS),
    SYSTEM: Case(CLIENTS, 1, SYSTEM_PROMPT),
    SINGLE: Case(1, CLIENTS),
}
PEER_CASES = {PEER_BASE: CASES[BASE], PEER_ONE: CASES[ONE], PEER_EACH: CASES[EACH]}
COMPARED = {BASE: (LOOP, PEER_BASE), ONE: (BASE, PEER_ONE), EACH: (BASE, PEER_EACH)}
"""{case: the case of which the table shows its throughput as a share, llama.cpp's case}"""

Ask = Callable[[httpx.Client, int, Sequence[int], int], "Answer"]
"""Asks one server: HTTP client, adapter (-1 for the base), prompt, most tokens."""


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
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as servers:
        adapters = make_adapters(options.base, Path(scratch))
        ours = servers.enter_context(server(options.base, adapters, options.dtype))
        peer = None
        if options.peer:
            base, loras = export(options.base, adapters, Path(scratch))
            peer = servers.enter_context(llama_cpp(base, loras, options))
        model = load_base(options.base, options.dtype)[0].eval()
        bar = tqdm(range(options.rounds + 1), disable=None)
        rounds = [measure(ours, peer, model, number, options) for number in bar][1:]
    options.folder.mkdir(parents=True, exist_ok=True)
    text = table(rounds, options)
    (options.folder / "serving.md").write_text(text, encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.serving", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--base", type=Path, default=Path("artifacts/base"), help="model folder with its tokenizer")
    parser.add_argument("--dtype", default="auto", help="of the base")
    parser.add_argument("--rounds", type=int, default=5, help="after one of warm-up")
    parser.add_argument("--requests", type=int, default=1, help="of each client in a round")
    parser.add_argument("--prompt", type=int, default=64, help="tokens, without a system prompt")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer at most")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="leave llama.cpp out")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the result is written")
    options = parser.parse_args()
    if not (options.base / "tokenizer.json").is_file():
        parser.error(f"--base: {options.base} holds no tokenizer.json; give a model folder with its tokenizer")
    if options.peer and importlib.util.find_spec("xllamacpp") is None:
        parser.error("xllamacpp is not installed; install it, or leave llama.cpp out by --no-peer")
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
    model.save_pretrained(folder / "adapters")
    return folder / "adapters"


def export(base: Path, adapters: Path, folder: Path) -> tuple[Path, list[Path]]:
    """The base and the adapters as GGUF files for llama.cpp."""
    from peftcore.export import export_gguf_lora, export_gguf_merged

    loras = [folder / f"a{number}.gguf" for number in range(CLIENTS)]
    for file in loras:
        export_gguf_lora(adapters / file.stem, "default", file, base)
    unchanged = peftcore.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, local_files_only=True),
        peftcore.LoraConfig(r=1, target_modules="all-linear"),  # starts at zero, so the merged model is the base
    )
    return export_gguf_merged(base, unchanged, folder / "base.gguf"), loras


# -- the servers -----------------------------------------------------------------------------------------------------


@contextmanager
def server(base: Path, adapters: Path, dtype: str) -> Iterator[str]:
    """A process of `peftcore serve`; gives its address."""
    command = [sys.executable, "-W", "ignore", "-c", "from flows.cli import app; app()", "serve", "--port", "0"]
    command += ["--base", str(base), "--adapters", str(adapters), "--name", "base", "--dtype", dtype]
    with process([*command, "--max-batch", str(CLIENTS)], r"serving .* on (http://\S+)") as url:
        yield url


LLAMA_CPP = """
import sys, xllamacpp
base, threads, context, slots, *loras = sys.argv[1:]
options = xllamacpp.CommonParams()
options.model.path, options.n_gpu_layers, options.verbosity, options.fit_params = base, 0, -1, False
options.n_parallel, options.n_ctx = int(slots), int(slots) * int(context)
options.cpuparams.n_threads = options.cpuparams_batch.n_threads = int(threads)
options.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(lora, 1.0) for lora in loras]
server = xllamacpp.Server(options)
print("llama.cpp serves on", server.listening_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def llama_cpp(base: Path, loras: Sequence[Path], options: argparse.Namespace) -> Iterator[str]:
    """A process of llama.cpp's server with one slot for each client; gives its address."""
    context = str(options.prompt + options.tokens + 8)
    command = [sys.executable, "-c", LLAMA_CPP, str(base), str(torch.get_num_threads()), context, str(CLIENTS)]
    with process([*command, *map(str, loras)], r"llama.cpp serves on (http://\S+)") as url:
        yield url


@contextmanager
def process(command: Sequence[str], address: str) -> Iterator[str]:
    """Start a server, and give the address that it prints."""
    pipe = subprocess.PIPE
    started = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    assert started.stdout is not None
    try:
        for line in started.stdout:
            if found := re.search(address, line):
                yield found.group(1)
                return
        raise SystemExit(f"the server did not start: {command[0]} ... {command[-1]}")
    finally:
        started.terminate()
        started.wait()
        started.stdout.close()


# -- one round -------------------------------------------------------------------------------------------------------


def measure(ours: str, peer: str | None, model: Any, number: int, options: argparse.Namespace) -> dict[str, Round]:
    """Every case once. number: of the round, which decides the prompts."""
    rounds = {LOOP: loop(model, number, options)}
    for url, ask, cases in ((ours, ask_ours, CASES), (peer, ask_llama_cpp, PEER_CASES)):
        if url is not None:
            with httpx.Client(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
                rounds |= {name: run(client, ask, name, case, number, options) for name, case in cases.items()}
    return rounds


def prompt_of(case: str, number: int, client: int, tokens: int, common: int = 0) -> list[int]:
    """Random tokens that no other case, round or client has, after `common` tokens that all of a case have."""
    shared = random.Random(case).choices(range(10, 250), k=common)
    return shared + random.Random(f"{case} {number} {client}").choices(range(10, 250), k=tokens)


@torch.no_grad()
def loop(model: Any, number: int, options: argparse.Namespace) -> Round:
    """The same tokens by a loop of the forward, without a server: what the model itself allows."""
    started = time.perf_counter()
    tokens = torch.tensor([prompt_of(LOOP, number, row, options.prompt) for row in range(CLIENTS)])
    cache, counted = None, 0
    for _ in range(options.tokens):
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, tokens = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
        counted += 1
    seconds = time.perf_counter() - started
    return Round([Answer(seconds, seconds, counted)] * CLIENTS, seconds)


def run(client: httpx.Client, ask: Ask, name: str, case: Case, number: int, options: argparse.Namespace) -> Round:
    """Run one case with all its clients at a time."""

    def work(place: int) -> list[Answer]:
        adapter = place % case.adapters if case.adapters else -1
        numbers = range(number * options.requests, (number + 1) * options.requests)
        prompts = [prompt_of(name, each, place, options.prompt, case.common) for each in numbers]
        return [ask(client, adapter, prompt, options.tokens) for prompt in prompts]

    started = time.perf_counter()
    with ThreadPoolExecutor(case.clients) as pool:
        answers = [answer for found in pool.map(work, range(case.clients)) for answer in found]
    return Round(answers, time.perf_counter() - started)


def ask_ours(client: httpx.Client, adapter: int, prompt: Sequence[int], tokens: int) -> Answer:
    model = "base" if adapter < 0 else f"a{adapter}"
    given = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    given |= {"stream": True, "stream_options": {"include_usage": True}}
    return timed(client, "/v1/completions", given, lambda event: (event.get("usage") or {}).get("completion_tokens"))


def ask_llama_cpp(client: httpx.Client, adapter: int, prompt: Sequence[int], tokens: int) -> Answer:
    lora = [{"id": each, "scale": float(each == adapter)} for each in range(CLIENTS)]
    given = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "lora": lora, "stream": True}
    return timed(client, "/completion", given, lambda event: event.get("tokens_predicted") or None)


def timed(client: httpx.Client, path: str, given: dict[str, Any], count: Callable[[Any], int | None]) -> Answer:
    """Send one request. count: returns the generated tokens of an event that says how many there were."""
    started = time.perf_counter()
    first, counted = 0.0, 0
    with client.stream("POST", path, json=given) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - started
                counted = count(json.loads(line.removeprefix("data: "))) or counted
    return Answer(first, time.perf_counter() - started, counted)


# -- the table -------------------------------------------------------------------------------------------------------


def table(rounds: Sequence[dict[str, Round]], options: argparse.Namespace) -> str:
    """Markdown: a row for each case."""
    lines = [
        f"`peftcore serve` over HTTP on loopback, {options.base.resolve().name} in {options.dtype}, LoRA r = {RANK} on "
        f"all linear layers; prompts of {options.prompt} new tokens, answers of {options.tokens} at most, streamed. "
        "Throughput: of all clients together. Ratios are medians (range) within a round. llama.cpp: its server with "
        "the same base in float16 and the same adapters.",
        "",
        "| case | clients | tokens/s | ratio | × llama.cpp | latency p50, p95, s | first token p50, p95, s |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    for case in rounds[0]:
        found = [one[case] for one in rounds]
        answers = [answer for one in found for answer in one.answers]
        against, peer = COMPARED.get(case, (None, None))
        share = f"{ratio(rounds, case, against)} of {against}" if against else ""
        times = f"{ratio(rounds, case, peer)}" if peer in rounds[0] else ""
        clients = CLIENTS if case == LOOP else (CASES | PEER_CASES)[case].clients
        lines.append(
            f"| {case} | {clients} | {statistics.median(one.throughput for one in found):.1f} | {share} | {times} | "
            f"{percentiles([a.whole for a in answers])} | "
            f"{'' if case == LOOP else percentiles([a.first for a in answers])} |"
        )
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return (
        "\n".join([*lines, "", f"{machine()}, servers with {threads} threads. `python -m benchmarks.serving`"]) + "\n"
    )


def ratio(rounds: Sequence[dict[str, Round]], case: str, other: str | None) -> str:
    """Median and range of a case's throughput over another's in the same round."""
    assert other is not None
    ratios = sorted(one[case].throughput / one[other].throughput for one in rounds)
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


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
