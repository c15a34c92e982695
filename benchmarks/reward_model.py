"""A reward model on the real model: held-out accuracy by what was rejected, and best-of-n answers that it chooses.

    python -m benchmarks.reward_model --base artifacts/base     # results/reward_model.md, .json
    python -m benchmarks.reward_model --params '{"data": {"train_rows": 64}}' --folder /tmp/quick

SmolLM2-135M-Instruct in NF4, LoRA r = 16 on all linear layers and a new head, is prepared for, trained, judged and
merged by the pipeline's own stages. The rows are the running Python's short documented functions. The chosen answer is
the function's own summary. The rejected one is another function's summary, or the own one without its second half.
Modules of test rows have no training rows. Then the base model without an adapter samples several answers to test
prompts, and the reward model chooses the best.
"""

import argparse
import json
import sysconfig
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy
import pyarrow.parquet as parquet

from benchmarks.machine import machine
from benchmarks.steps import quiet
from flows.base.folder import load_tokenizer
from flows.base.model import compute_dtype, load_original
from flows.data.chat import end_token
from flows.data.docstrings import Pair, pairs, prompt
from flows.data.rows import read_rows
from flows.evaluation.generation import Sampling, generate_answers
from flows.evaluation.scoring import rouge_l
from flows.params import Params
from flows.paths import Paths
from flows.runtime.stage import set_seed
from flows.stages import evaluate, merge, prepare, train
from peftcore.train import RewardModel, best_of_n, divergence_bound, expected_best

Sections = dict[str, dict[str, Any]]
SECTIONS: Sections = {
    "data": {
        "source": "rows.jsonl",
        "kind": "preference",
        "group_column": "module",
        "slice_column": "rejected_is",
        "near_duplicates": "keep",  # half of the pairs differ in their rejected answer alone
        "max_length": 96,
        "train_rows": 128,
        "validation_rows": 16,
        "test_rows": 80,
    },
    "train": {
        "objective": "reward",
        "gradient_accumulation": 1,
        "learning_rate": 2e-4,
        "warmup_share": 0.1,
        "evaluations": 1,
    },
    "evaluate": {"rows": 80, "generate_rows": 8, "max_new_tokens": 20, "samples": 8},
    "merge": {"rows": 16},
    "tracking": {"mode": "disabled"},
}
LONGEST = 160
"""Maximum characters of a function's source, so that a run takes minutes on a CPU."""
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.reward_model", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--base", type=Path, default=Path("artifacts/base"), help="model folder")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results are written")
    parser.add_argument("--params", type=json.loads, default={}, help="JSON: sections over the benchmark's own")
    parser.add_argument("--prompts", type=int, default=6, help="prompts of best-of-n")
    parser.add_argument("--answers", type=int, default=8, help="sampled answers to each prompt")
    options = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory(prefix="peftcore-reward-model-") as scratch:
        result = measure(options, Path(scratch))
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "reward_model.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (options.folder / "reward_model.md").write_text(table(result), encoding="utf-8")
    print(table(result))


def measure(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Run the stages below root, and best-of-n with the trained adapter."""
    sections = {name: SECTIONS.get(name, {}) | options.params.get(name, {}) for name in {*SECTIONS, *options.params}}
    params, paths = Params.model_validate(sections), Paths(root)
    paths.artifacts.mkdir()
    paths.base.symlink_to(options.base.resolve())
    library = pairs(Path(sysconfig.get_paths()["stdlib"]))
    rows = preferences([pair for pair in library if len(pair.source) <= LONGEST])
    (root / params.data.source).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    seconds = {}
    for stage in (prepare, train, evaluate, merge):
        set_seed(params.project.seed)
        started = time.process_time()
        stage.run(params, paths)
        seconds[stage.__name__.rpartition(".")[2]] = time.process_time() - started
    accuracies: dict[str, list[float]] = defaultdict(list)
    for row in parquet.read_table(paths.evaluation_rows).to_pylist():
        accuracies[row["slice"]].append(row["adapter_accuracy"])
    return {
        "steps": json.loads(paths.training_summary.read_text(encoding="utf-8"))["steps"],
        "metrics": json.loads(paths.evaluation_metrics.read_text(encoding="utf-8")),
        "accuracies": {name: {"rows": len(one), "accuracy": numpy.mean(one)} for name, one in accuracies.items()},
        "merge": json.loads(paths.merge_report.read_text(encoding="utf-8")),
        "best_of_n": chosen_by(params, paths, options.prompts, options.answers),
        "seconds": seconds,
        "machine": machine(),
    }


def preferences(library: list[Pair]) -> list[dict[str, str]]:
    """Every function's own summary as the chosen answer; rejected: another's, or the first half of the own one."""
    others = [library[i].summary for i in numpy.random.default_rng(0).permutation(len(library))]
    rows = []
    for number, (pair, other) in enumerate(zip(library, others, strict=True)):
        words, truncated = pair.summary.split(), number % 2 == 1
        rejected = " ".join(words[: len(words) // 2]) if truncated else other
        row = {"prompt": prompt(pair.source), "chosen": pair.summary, "rejected": rejected, "module": pair.module}
        if rejected != pair.summary:
            rows.append(row | {"rejected_is": "truncated" if truncated else "another function's"})
    return rows


def chosen_by(params: Params, paths: Paths, prompts: int, count: int) -> list[dict[str, float]]:
    """Reward and ROUGE-L of the best of several answers that the base samples to prompts of the test rows."""
    rows = list({row["prompt"]: row for row in read_rows(paths.split("test"))}.values())[:prompts]
    tokenizer = load_tokenizer(paths.base)
    model = load_original(paths.base, compute_dtype(params.quantization))
    by_prompt = {row["prompt"]: row["chosen_input_ids"][: row["prompt_length"]] for row in rows}

    def sample(asked: Any) -> list[str]:
        ids, sampling = [by_prompt[text] for text in asked], Sampling(params.project.seed, 0.8, 0.95)
        output = generate_answers(model, tokenizer, ids, params.evaluate.max_new_tokens, 32, sampling=sampling)
        return [answer.text for answer in output.answers]

    reward = RewardModel.from_pretrained(paths.adapter, paths.base, tokenizer, dtype=compute_dtype(params.quantization))
    reward.end_token_id = end_token(tokenizer)
    results = best_of_n(list(by_prompt), sample, reward, count)
    rewards = [one.rewards for one in results]
    quality = [rouge_l([row["chosen"]] * count, one.answers) for row, one in zip(rows, results, strict=True)]
    return [
        {
            "n": n,
            "reward": expected_best(rewards, k=n),
            "rouge_l": expected_best(rewards, quality, n),
            "kl_bound": divergence_bound(n),
        }
        for n in sorted({*(2**power for power in range(count.bit_length())), count})
    ]


def table(result: dict[str, Any]) -> str:
    """Markdown: accuracy by what was rejected, then reward and ROUGE-L by n."""
    base, adapter, merged = result["metrics"]["base"], result["metrics"]["adapter"], result["merge"]
    lines = [
        f"{str(__doc__).partition(chr(10))[0]} SmolLM2-135M-Instruct in NF4, LoRA r 16 and a head of one output, "
        f"{result['steps']} steps. The base gives equal rewards.",
        "",
        "| held-out pairs | rows | accuracy, % |",
        "|---|---:|---:|",
        f"| all | {result['metrics']['rows']} | {100 * base['accuracy']:.1f} → {100 * adapter['accuracy']:.1f} |",
        *(
            f"| rejected: {name} | {one['rows']} | 50.0 → {100 * one['accuracy']:.1f} |"
            for name, one in sorted(result["accuracies"].items())
        ),
        "",
        f"Loss {base['loss']:.3f} → {adapter['loss']:.3f} nats, mean margin {adapter['margin']:.2f}. Merged into the "
        f"{merged['into']} base: KL {merged['kl']:.4f} nats, the same answer preferred in "
        f"{100 * merged['top1_agreement']:.1f} % of {merged['tokens']} pairs. Training took "
        f"{result['seconds']['train']:.0f} s of the processor.",
        "",
        "| best of n answers of the base | reward | ROUGE-L with the function's own summary |",
        "|---:|---:|---:|",
        *(f"| {one['n']} | {one['reward']:+.2f} | {one['rouge_l']:.3f} |" for one in result["best_of_n"]),
        "",
        f"Measured on {result['machine']}. `python -m benchmarks.reward_model`",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
