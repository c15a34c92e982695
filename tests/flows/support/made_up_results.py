"""Made-up results of the stages before register. Few imports, because stages of the tests' repositories use it too."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import pyarrow
from pyarrow import parquet
from safetensors.numpy import save_file

from flows.verdicts import suite_figures
from peftcore.files import write_manifest

SCORED = {
    **{"scorer": "", "options": {}, "on_error": "stop", "files": {}},
    **{"answers": 10, "failures": {"base": 0, "adapter": 0}, "first_failure": None},
}
MERGED = {"kl": 0.002, "top1_agreement": 0.99, "loss": 2.81, "reference_loss": 2.8, "tokens": 400}


def write_results(
    folder: Path,
    loss: float = 2.7,
    weight: float = 1.0,
    row_changes: Sequence[float] = (0.0,) * 40,
    row_slices: Sequence[str] = ("json",) * 30 + ("<ssl>",) * 10,
    scores: Mapping[str, tuple[float, float]] = {},
    suites: Mapping[str, Any] = {},
    **metrics: Any,
) -> None:
    """What the stages before register leave: an adapter of weights `weight`, a test loss of `loss` nats a token.

    row_changes, row_slices: of the 40 test rows, what is added to their losses, and where they belong.
    scores: {built-in scorer: scores of base and adapter}, of ten answers each.
    suites: content of evaluation/suites.json.
    metrics: other values for the keys of evaluation/metrics.json; the rows are such that its figures follow from them.
    """
    for name in ("adapter", "data", "evaluation", "training"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    _write_adapter(folder / "adapter", weight)
    noise = numpy.random.default_rng(0).normal(0, 0.02, 40)
    told = metrics.get("adapter", {}).get("loss", loss)
    losses = told + noise - noise.mean() + numpy.asarray(row_changes)
    loss = float(losses.mean()) if any(row_changes) else told
    side = {"perplexity": 10.0, "tokens_per_second": 100.0}
    sides = {
        "base": metrics.pop("base", {"loss": 3.8, "rouge_l": 0.16, "ended": 0.3, **side}),
        "adapter": metrics.pop("adapter", {"loss": loss, "rouge_l": 0.31, "ended": 1.0, **side}),
    }
    names, rows = numpy.array(row_slices), {"base": numpy.full(40, 3.8), "adapter": losses}
    columns = {"id": [f"row{n}" for n in range(40)], "slice": list(row_slices), "tokens": [10] * 40}
    columns |= {f"{name}_loss": values for name, values in rows.items()}
    for name, figures in sides.items():
        columns |= _answers(name, figures)
    for scorer, values in scores.items():
        for name, value in zip(sides, values, strict=True):
            sides[name] = sides[name] | {scorer: value}
            columns[f"{name}_{scorer}"] = [value + 0.01 * (-1) ** n for n in range(10)] + [None] * 30
    if scores:
        metrics["scorers"] = {name: SCORED | {"scorer": name} for name in scores}
    if suites:
        metrics["suites"] = {
            name: suite_figures(one) | {key: one[key] for key in ("content", "files")} for name, one in suites.items()
        }
        (folder / "evaluation" / "suites.json").write_text(json.dumps(suites))
    else:
        (folder / "evaluation" / "suites.json").unlink(missing_ok=True)
    parquet.write_table(pyarrow.table(columns), folder / "evaluation" / "rows.parquet")
    control = {"id": [f"text{n}" for n in range(8)], "tokens": [100] * 8, "base_loss": [3.0] * 8}
    parquet.write_table(pyarrow.table(control | {"adapter_loss": [2.9] * 8}), folder / "evaluation" / "control.parquet")
    for name, value in {
        "evaluation/metrics.json": {
            **sides,
            "gain": {
                "loss": sides["base"]["loss"] - sides["adapter"]["loss"],
                "rouge_l": sides["adapter"].get("rouge_l", 0.0) - sides["base"].get("rouge_l", 0.0),
                **{name: adapter - base for name, (base, adapter) in scores.items()},
            },
            "rows": 40,
            "generated_rows": 10,
            "evaluation_set": "e" * 64,
            "base_model": "b" * 64,
            "control": {"base_loss": 3.0, "adapter_loss": 2.9, "rows": 8},
            "slices": {
                name: {"rows": int((names == name).sum())}
                | {f"{side}_loss": float(losses[names == name].mean()) for side, losses in rows.items()}
                | {
                    f"{side}_{scorer}": values[number] if name == row_slices[0] else None
                    for scorer, values in scores.items()
                    for number, side in enumerate(sides)
                }
                for name in sorted(set(row_slices))
            },
            **metrics,
        },
        "evaluation/samples.json": [SAMPLE],
        "training/summary.json": SUMMARY,
        "merge.json": {"into": "dequantized", **MERGED, "candidates": {"dequantized": MERGED, "requantized": MERGED}},
        "data/report.json": REPORT,
        "architecture.json": ARCHITECTURE,
    }.items():
        (folder / name).write_text(json.dumps(value))
    (folder / "training" / "loss.csv").write_text(LOSSES)


def _answers(side: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Columns of ten answers, and of forty predicted classes, that come to these figures."""
    ended, rouge_l = figures.get("ended"), figures.get("rouge_l")
    count = 0 if ended is None or ended != ended else round(10 * ended)
    right = round(40 * figures.get("accuracy", 0))
    return {
        "label": ["right"] * 40,
        f"{side}_prediction": ["right"] * right + ["wrong"] * (40 - right),
        f"{side}_rouge_l": [rouge_l] * 10 + [None] * 30,
        f"{side}_ended": pyarrow.array([n < count for n in range(10)] + [None] * 30, pyarrow.bool_()),
    }


def _write_adapter(folder: Path, weight: float) -> None:
    tensors = {"layer.lora_A.weight": numpy.full((2, 4), weight, numpy.float32)}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    write_manifest(folder)


def suite_result(failed: Mapping[str, str] = {}, identity: Mapping[str, Any] = {}) -> dict[str, Any]:
    """A suite of three prompts a, b and c with one greedy answer each. failed: {prompt: why it fails}."""
    prompts = [
        {
            "id": name,
            "prompt": f"Tell <{name}>.",
            "must": ["must contain 'x'", "must refuse"],
            "answers": [
                {
                    "seed": None,
                    "text": f"<i>answer</i> {name}",
                    "ended": True,
                    "failed": {"0": f"must contain 'x': {failed[name]}"} if name in failed else {},
                }
            ],
        }
        for name in "abc"
    ]
    settings = {"seeds": [], "pass_at": 1, "at_least": 1.0}
    return {"content": "c" * 64, "files": {}} | dict(identity) | settings | {"prompts": prompts}


SAMPLE = {
    "id": "a",
    "slice": "json",
    "prompt": "def greet(): ...",
    "reference": "Say <hello> & wave.",
    "base": "<script>alert(1)</script>",
    "adapter": "Say hello.",
}
SUMMARY = {
    "steps": 4,
    "best_step": 4,
    "best_validation_loss": 2.7,
    "seconds": 61.0,
    "tokens": 1234,
    "trainable_parameters": 8,
    "wandb_run_id": None,
    "method": "lora",
}
LOSSES = """\
step,train_loss,validation_loss,learning_rate
1,3.5,,0.0005
2,3.1,3.0,0.0004
3,2.9,,0.0002
4,2.8,2.7,0.0
"""
_SPLIT = {
    "rows": 40,
    "available": 50,
    "groups": 4,
    "slices": 2,
    "truncated": 0,
    "tokens": 900,
    "length": {"min": 5, "median": 20, "p90": 40, "p99": 50, "max": 60},
    "supervised_tokens": 90,
    "supervised_share": 0.1,
    "supervised_length": {"min": 1, "median": 2, "p90": 4, "p99": 5, "max": 6},
}
REPORT = {
    "source": "stdlib:docstrings",
    "examples": 60,
    "dropped": {"longer than 320 tokens": 3},
    "splits": {"train": _SPLIT, "validation": _SPLIT, "test": _SPLIT},
    "leakage": {"train-test": {"groups": 0, "prompts": 0}},
    "doctor": {
        "examined": {"train": "1" * 64, "validation": "2" * 64, "test": "3" * 64},
        "findings": [
            {
                "check": "characters",
                "severity": "warning",
                "figure": "2 of 120 rows hold control characters",
                "value": 0.0167,
                "fix": "write the source as UTF-8",
                "examples": ["a"],
            }
        ],
    },
    "rendered": [{"id": "a", "segments": [["user: greet()", False], ["Say hello.", True]]}],
}
ARCHITECTURE = {
    "family": "llama",
    "class_name": "LlamaForCausalLM",
    "kind": "causal decoder",
    "num_blocks": 2,
    "hidden_size": 8,
    "vocab_size": 100,
    "parameters": 1000,
    "memory_bfloat16": 2000,
    "memory_nf4": 900,
    "tied_weights": [],
    "target_modules": {"q_proj": {"role": "query", "in_features": 8, "out_features": 8, "count": 2}},
}
