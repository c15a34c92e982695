"""Structured output and tool calls of `peftcore serve` with a real model, and what the token masks cost.

    python -m benchmarks.structured                # results/structured.md; needs the extra `structured`
    python -m benchmarks.structured --rounds 1     # a quick look

One process of the server; the clients are threads of this one. Each round sends the same chats twice: with a JSON
schema, and free. Every answer with a schema is checked by the package jsonschema. At the beginning the
model must call a tool (`tool_choice: required`), in Qwen's form, which the chat template of this benchmark describes.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
from tqdm import tqdm

from benchmarks.machine import machine
from benchmarks.serving import process
from benchmarks.steps import quiet

RESULTS = Path(__file__).parent / "results"
CLIENTS = 4
TEMPLATE = """{%- if tools %}<|im_start|>system
You may call functions. Answer with <tool_call>
{"name": ..., "arguments": {...}}
</tool_call>. The functions:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""ChatML with tools, in Qwen's form."""
NAME = {"type": "string", "minLength": 1, "maxLength": 24}
SCHEMAS: dict[str, dict[str, Any]] = {
    "person": {
        "type": "object",
        "properties": {"name": NAME, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "sentiment": {
        "type": "object",
        "properties": {
            "sentiment": {"enum": ["positive", "neutral", "negative"]},
            "score": {"type": "number", "minimum": 0, "maximum": 1},
        },
        "required": ["sentiment", "score"],
        "additionalProperties": False,
    },
    "list": {"type": "array", "items": NAME, "minItems": 2, "maxItems": 4},
    "order": {
        "type": "object",
        "properties": {
            "items": {"type": "array", "minItems": 1, "maxItems": 2, "items": {"$ref": "#/$defs/item"}},
            "paid": {"type": "boolean"},
        },
        "required": ["items", "paid"],
        "additionalProperties": False,
        "$defs": {
            "item": {
                "type": "object",
                "properties": {"product": NAME, "count": {"type": "integer", "minimum": 1, "maximum": 99}},
                "required": ["product", "count"],
                "additionalProperties": False,
            }
        },
    },
    "event": {
        "type": "object",
        "properties": {
            "date": {"type": "string", "format": "date"},
            "place": {"anyOf": [NAME, {"type": "null"}]},
            "code": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2}$"},
        },
        "required": ["date", "place", "code"],
        "additionalProperties": False,
    },
}
PROMPTS = (
    "Anna Berg is 34 years old and bought three lamps in Oslo.",
    "The concert on the 3rd of May was wonderful.",
    "I never got my order of two chairs, and nobody answers.",
    "Please summarise: the meeting in Rome was moved by a week.",
)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "minLength": 1, "maxLength": 24},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


def main() -> None:
    options = parse()
    quiet()
    with tempfile.TemporaryDirectory() as scratch:
        template = Path(scratch) / "template.jinja"
        template.write_text(TEMPLATE, encoding="utf-8")
        command = [sys.executable, "-W", "ignore", "-c", "from flows.cli import app; app()", "serve", "--port", "0"]
        command += ["--base", str(options.base), "--name", "base", "--chat-template", str(template)]
        with (
            process([*command, "--max-batch", str(CLIENTS)], r"serving .* on (http://\S+)") as url,
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0) as client,
        ):
            call = tool_call(client)
            rounds = [run(client, url, options.tokens) for _ in tqdm(range(options.rounds), disable=None)]
    text = table(rounds, call, options)
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "structured.md").write_text(text, encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.structured", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--base", type=Path, default=Path("artifacts/base"), help="model folder with its tokenizer")
    parser.add_argument("--rounds", type=int, default=3, help="each with every schema and prompt")
    parser.add_argument("--tokens", type=int, default=160, help="of an answer at most")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the result is written")
    options = parser.parse_args()
    if not (options.base / "tokenizer.json").is_file():
        parser.error(f"--base: {options.base} holds no tokenizer.json; give a model folder with its tokenizer")
    if importlib.util.find_spec("llguidance") is None:
        parser.error("llguidance is not installed; install it with: pip install 'peftcore[structured]'")
    return options


def run(client: openai.OpenAI, url: str, tokens: int) -> dict[str, float]:
    """One round: every schema with every prompt, and the same chats without a schema; greedy."""

    def ask(schema: str | None, prompt: str, most: int) -> tuple[int, bool]:
        """Tokens of one answer, and whether it is valid."""
        form: Any = {"type": "text"}
        if schema is not None:
            form = {"type": "json_schema", "json_schema": {"name": schema, "strict": True, "schema": SCHEMAS[schema]}}
        reply = client.chat.completions.create(
            model="base",
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            max_tokens=most,
            response_format=form,
        )
        usage, choice = reply.usage, reply.choices[0]
        assert usage is not None
        return usage.completion_tokens, schema is None or is_valid(choice.message.content, SCHEMAS[schema])

    seconds, tokens_of = {"masked": 0.0, "free": 0.0}, {"masked": 0, "free": 0}
    valid, before = 0, masks(url)
    with ThreadPoolExecutor(CLIENTS) as pool:
        for schema in SCHEMAS:  # masked and free in turns, so that load of other processes is in both
            started = time.perf_counter()
            masked = list(pool.map(lambda prompt, name=schema: ask(name, prompt, tokens), PROMPTS))
            halfway = time.perf_counter()
            # of the same lengths, so that the batch has as many rows
            free = list(pool.map(lambda prompt, one: ask(None, prompt, one[0]), PROMPTS, masked))
            seconds["masked"] += halfway - started
            seconds["free"] += time.perf_counter() - halfway
            for kind, answers in (("masked", masked), ("free", free)):
                tokens_of[kind] += sum(count for count, _ in answers)
            valid += sum(is_one for _, is_one in masked)
    spent, count = (after - earlier for after, earlier in zip(masks(url), before, strict=True))
    return {
        "tokens/s with masks": tokens_of["masked"] / seconds["masked"],
        "tokens/s without": tokens_of["free"] / seconds["free"],
        "ms per mask": spent / count * 1000,
        "valid": valid,
        "requests": len(SCHEMAS) * len(PROMPTS),
    }


def is_valid(text: str | None, schema: dict[str, Any]) -> bool:
    """True if a text is JSON that fits a schema."""
    try:
        jsonschema.validate(json.loads(text or ""), schema, format_checker=jsonschema.FormatChecker())
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def masks(url: str) -> tuple[float, float]:
    """CPU seconds of all masks of the server so far, and their number."""
    lines = dict(line.rsplit(" ", 1) for line in httpx.get(f"{url}/metrics").text.splitlines() if line[0] != "#")
    return float(lines["peftcore_grammar_mask_seconds_total"]), float(lines["peftcore_grammar_tokens_total"])


def tool_call(client: openai.OpenAI) -> str:
    """The call of a tool that the model must call; raises an error unless its arguments fit their schema."""
    tools: Any = [TOOL]
    reply = client.chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": "Is it warm in Oslo?"}],
        tools=tools,
        tool_choice="required",
        temperature=0,
        max_tokens=160,
        parallel_tool_calls=False,
    )
    choice = reply.choices[0]
    (call,) = choice.message.tool_calls or ()
    assert choice.finish_reason == "tool_calls" and call.type == "function"
    jsonschema.validate(json.loads(call.function.arguments), TOOL["function"]["parameters"])  # type: ignore[index]
    return f"{call.function.name}({call.function.arguments})"


def table(rounds: Sequence[dict[str, float]], call: str, options: argparse.Namespace) -> str:
    """Markdown of all rounds."""
    valid, requests = (int(sum(one[key] for one in rounds)) for key in ("valid", "requests"))
    free, masked, mask = (
        statistics.median(one[key] for one in rounds)
        for key in ("tokens/s without", "tokens/s with masks", "ms per mask")
    )
    ratios = sorted(one["tokens/s with masks"] / one["tokens/s without"] for one in rounds)
    return (
        f"{options.base.resolve().name}, {CLIENTS} clients, {len(SCHEMAS)} schemas with {len(PROMPTS)} prompts each, "
        f"greedy, {len(rounds)} rounds.\n\n"
        "| | |\n|---|---:|\n"
        f"| answers with a JSON schema that are valid | {valid} of {requests} |\n"
        f"| tokens/s without masks | {free:.1f} |\n"
        f"| tokens/s with masks | {masked:.1f} |\n"
        f"| with / without, median (range) | {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |\n"
        f"| CPU time of one mask | {mask:.2f} ms |\n"
        f"| `tool_choice: required` | `{call}` |\n\n"
        f"{machine()}. `python -m benchmarks.structured`\n"
    )


if __name__ == "__main__":
    main()
