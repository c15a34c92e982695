"""GRPO on the real model with rewards that are checked by a program, by the pipeline's own stages.

    python -m benchmarks.grpo               # prints rewards of the base, of the adapter, and during training
    python -m benchmarks.grpo --steps 60    # longer

SmolLM2-135M-Instruct writes the summary line of the running Python's documented functions. A summary gets half a point
if it ends with a full stop, and half a point if it has at most 12 words. Rewards are means over greedy answers to
prompts of the test split, which training does not see.
"""

import argparse
import json
import sysconfig
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.steps import quiet
from flows.data.docstrings import pairs, prompt
from flows.params import Params
from flows.paths import Paths
from flows.runtime.stage import set_seed
from flows.stages import evaluate, prepare, train

FUNCTIONS = 1500
"""Functions of the library that are read (count)."""
REWARDS = """\
def full_stop(prompt, answer, reference, row):
    return float(answer.endswith("."))

def at_most_12_words(prompt, answer, reference, row):
    return float(0 < len(answer.split()) <= 12)
"""


def main() -> None:
    options = parse()
    quiet()
    with tempfile.TemporaryDirectory(prefix="peftcore-grpo-") as scratch:
        report(measure(options, Path(scratch)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grpo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", type=Path, default=Path("artifacts/base"), help="folder of the fetched base")
    parser.add_argument("--steps", type=int, default=24, help="optimiser steps of 2 prompts with 4 answers each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not options.base.is_dir():
        parser.error(f"there is no {options.base}; run `peftcore stage fetch`, or give --base FOLDER")
    return options


def sections(options: argparse.Namespace) -> dict[str, Any]:
    names = ("full_stop", "at_most_12_words")
    rewards = [{"scorer": f"data/rewards.py:{name}", "weight": 0.5} for name in names]
    return {
        "project": {"seed": options.seed},
        "data": {
            "source": "rows.jsonl",
            "max_length": 128,
            "train_rows": 200,
            "validation_rows": 8,
            "test_rows": 48,
            "system_prompt": "You write the one-line summary of Python functions.",
        },
        "quantization": {"storage": "none", "compute_dtype": "float32"},
        "train": {
            "objective": "grpo",
            "grpo": {"rewards": rewards, "group_size": 4, "max_new_tokens": 32, "beta": 0.02},
            "batch_size": 2,
            "gradient_accumulation": 1,
            "max_steps": options.steps,
            "learning_rate": 3e-4,
            "evaluations": 1,
        },
        "evaluate": {
            "rows": 48,
            "generate_rows": 48,
            "max_new_tokens": 32,
            "latency_rows": 0,
            "control": {"source": None},
        },
        "tracking": {"mode": "disabled"},
    }


def measure(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Run the stages below root, and return metrics, training records and the seconds of training."""
    params, paths = Params.model_validate(sections(options)), Paths(root)
    paths.artifacts.mkdir()
    paths.base.symlink_to(options.base.resolve())
    (root / "data").mkdir()
    (root / "data" / "rewards.py").write_text(REWARDS, encoding="utf-8")
    library = islice(pairs(Path(sysconfig.get_paths()["stdlib"])), FUNCTIONS)
    rows = [{"prompt": prompt(pair.source), "completion": pair.summary} for pair in library]
    (root / params.data.source).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    set_seed(options.seed)
    prepare.run(params, paths)
    started = time.perf_counter()
    train.run(params, paths)
    seconds = time.perf_counter() - started
    evaluate.run(params, paths)
    return {
        "metrics": json.loads(paths.evaluation_metrics.read_text(encoding="utf-8")),
        "records": [json.loads(line) for line in paths.training_log.read_text(encoding="utf-8").splitlines()],
        "samples": json.loads(paths.samples.read_text(encoding="utf-8")),
        "seconds": seconds,
    }


def report(result: dict[str, Any]) -> None:
    steps = [record for record in result["records"] if record["loss"] is not None]
    print(f"training: {len(steps)} steps in {result['seconds']:.0f} s")
    for record in steps:
        print(
            f"  step {record['step']:3}: reward {record['reward']:.2f}, {record['answer_tokens']:.0f} tokens, EOS rate "
            f"{record['eos_rate']:.2f}, groups of equal rewards {record['equal_groups']:.2f}, KL {record['kl']:.4f}"
        )
    base, adapter = result["metrics"]["base"], result["metrics"]["adapter"]
    print(f"on {result['metrics']['generated_rows']} test prompts, greedy answers:")
    for name in ("reward", "full_stop", "at_most_12_words", "ended", "rouge_l", "loss"):
        print(f"  {name:17} base {base[name]:.3f}   adapter {adapter[name]:.3f}")
    for sample in result["samples"][:3]:
        print(f"  base: {sample['base']!r}\n  adapter: {sample['adapter']!r}")


if __name__ == "__main__":
    main()
