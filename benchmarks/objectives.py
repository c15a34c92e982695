"""The objectives beside SFT on the real model: DPO, ORPO and classification by the pipeline's own stages.

    python -m benchmarks.objectives                  # every cell that is missing, then results/objectives.md, .json
    python -m benchmarks.objectives --only orpo-1    # one cell: arm-seed
    python -m benchmarks.objectives --missing        # names the cells that are still to be measured
    python -m benchmarks.objectives --draw           # table from the cells that are there

SmolLM2-135M-Instruct in NF4, LoRA r = 16 on all linear layers, is prepared for, trained, judged and merged at the
parameters' defaults but for what ARMS and SECTIONS say. The rows are the running Python's documented functions: of a
pair the chosen answer is a function's own summary and the rejected one another's; of a labelled text the class is the
package that the function is from. Each cell is kept in a file of its own, so a run that was cut off goes on.
"""

import argparse
import json
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from benchmarks.cells import Cell, check, machines, measure_missing, parser_of, scatter, there
from benchmarks.steps import quiet
from flows.data.docstrings import Pair, pairs, prompt
from flows.errors import StageError
from flows.params import Params
from flows.paths import Paths
from flows.runtime.stage import set_seed
from flows.stages import evaluate, merge, prepare, train

CLASSES = 8
TEXTS_PER_CLASS = 64
Sections = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Arm:
    """title: in the table; objective: of train; sections: of the parameters, over SECTIONS."""

    title: str
    objective: str
    sections: Sections


PAIRS: Sections = {
    "data": {"kind": "preference", "group_column": "module", "train_rows": 240, "validation_rows": 32},
    "evaluate": {"generate_rows": 32},
}
TEXTS: Sections = {
    "data": {
        "kind": "classification",
        "max_length": 128,
        "overlong": "truncate",
        "validation_share": 0.0625,
        "test_share": 0.25,
        "train_rows": 320,
        "validation_rows": 32,
    },
    "train": {"epochs": 3.0, "learning_rate": 5e-4},
}
ARMS = {
    "dpo": Arm("DPO, rate 5e-5", "dpo", PAIRS | {"train": {"learning_rate": 5e-5}}),
    "dpo-fast": Arm("DPO, rate 2e-4", "dpo", PAIRS | {"train": {"learning_rate": 2e-4}}),
    "orpo": Arm("ORPO, rate 2e-4", "orpo", PAIRS | {"train": {"learning_rate": 2e-4}}),
    "classification": Arm("classification, rate 5e-4", "classification", TEXTS),
}
SECTIONS: Sections = {
    "data": {"source": "rows.jsonl", "test_rows": 128},
    "train": {"gradient_accumulation": 1, "warmup_share": 0.1, "evaluations": 2},
    "evaluate": {"rows": 128},
    "tracking": {"mode": "disabled"},
}
FIGURES = (
    ("loss, nats", "loss", 3, 1.0),
    ("chosen likelier, or right class, %", "accuracy", 1, 100.0),
    ("moved to the chosen, %", "reward_accuracy", 1, 100.0),
    ("macro F1", "macro_f1", 3, 1.0),
    ("ROUGE-L", "rouge_l", 3, 1.0),
)
"""(column, metric, digits, factor)"""


def main() -> None:
    options = parse()
    quiet()
    arms = {f"{arm}-{seed}": (arm, seed) for seed in range(options.seeds) for arm in ARMS}

    def measure(name: str) -> Cell:
        with tempfile.TemporaryDirectory(prefix="peftcore-objectives-") as scratch:
            return measure_cell(*arms[name], options, Path(scratch))

    if measure_missing(options, list(arms), settings_of(options), measure):
        report(options, there(options, list(arms), settings_of(options)))


def parse() -> argparse.Namespace:
    parser = parser_of("objectives", __doc__, prepared=False)
    parser.set_defaults(seeds=2)
    parser.add_argument("--params", type=json.loads, default={}, help="JSON: sections over every arm's own")
    options = parser.parse_args()
    check(parser, options, [f"{arm}-{seed}" for seed in range(options.seeds) for arm in ARMS])
    return options


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    return {"base": str(options.base), "params": {arm: sections_of(arm, 0, options.params) for arm in ARMS}}


# -- a cell ----------------------------------------------------------------------------------------------------------


def sections_of(arm: str, seed: int, given: Sections) -> Sections:
    """What the parameters of an arm's run are validated from."""
    merged: Sections = {"project": {"seed": seed}, "train": {"objective": ARMS[arm].objective}}
    for sections in (SECTIONS, ARMS[arm].sections, given):
        for name, section in sections.items():
            merged[name] = merged.get(name, {}) | section
    return merged


def measure_cell(arm: str, seed: int, options: argparse.Namespace, root: Path) -> Cell:
    """Run the stages below root; the merge's fidelity is None where the stage refused it, which `refused` then says."""
    params, paths = Params.model_validate(sections_of(arm, seed, options.params)), Paths(root)
    paths.artifacts.mkdir()
    paths.base.symlink_to(options.base.resolve())
    library = list(pairs(Path(sysconfig.get_paths()["stdlib"])))
    rows = labelled_texts(library) if params.data.kind == "classification" else preferences(library)
    (root / params.data.source).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def timed(stage: Callable[[Params, Paths], None]) -> float:
        set_seed(seed)
        started = time.process_time()
        stage(params, paths)
        return time.process_time() - started

    seconds = {stage.__name__.rpartition(".")[2]: timed(stage.run) for stage in (prepare, train, evaluate)}
    refused = None
    try:
        seconds["merge"] = timed(merge.run)
    except StageError as error:
        refused = str(error)
    return {
        "steps": json.loads(paths.training_summary.read_text(encoding="utf-8"))["steps"],
        "metrics": json.loads(paths.evaluation_metrics.read_text(encoding="utf-8")),
        "merge": None if refused else json.loads(paths.merge_report.read_text(encoding="utf-8")),
        "refused": refused,
        "seconds": seconds,
    }


def preferences(library: list[Pair]) -> list[dict[str, str]]:
    """Every function's own summary as the chosen answer, and one of another text as the rejected."""
    others = [library[i].summary for i in numpy.random.default_rng(0).permutation(len(library))]
    return [
        {"prompt": prompt(pair.source), "chosen": pair.summary, "rejected": other, "module": pair.module}
        for pair, other in zip(library, others, strict=True)
        if other != pair.summary
    ]


def labelled_texts(library: list[Pair]) -> list[dict[str, str]]:
    """As many functions of each of the largest packages, labelled with the package."""
    packages = [pair.module.split(".")[0] for pair in library]
    rows = []
    for name, count in Counter(packages).most_common(CLASSES):
        own = [pair for pair, package in zip(library, packages, strict=True) if package == name]
        chosen = numpy.random.default_rng(0).permutation(count)[:TEXTS_PER_CLASS]
        rows += [{"text": own[i].source, "label": name} for i in chosen]
    return rows


# -- the table -------------------------------------------------------------------------------------------------------


def report(options: argparse.Namespace, cells: dict[str, Cell]) -> None:
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "objectives.json").write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
    text = table(cells)
    (options.folder / "objectives.md").write_text(text, encoding="utf-8")
    print(text)


def table(cells: dict[str, Cell]) -> str:
    """Markdown: a row for each arm, before -> after."""
    columns = ["objective", "seeds", "steps", *(column for column, *_ in FIGURES)]
    columns += ["merge: KL, nats", "first choice kept, %", "merged", "training, s"]
    lines = [
        f"{str(__doc__).partition(chr(10))[0]} SmolLM2-135M-Instruct in NF4, LoRA r 16 on all linear layers, held-out "
        "rows, before and after training. A classifier's base is the frequencies of the classes. Mean over seeds ± "
        "their standard deviation; seconds are the processor's.",
        "",
        f"| {' | '.join(columns)} |",
        "|---|" + "---:|" * (len(columns) - 1),
    ]
    for name, arm in ARMS.items():
        if own := [cell for cell_name, cell in cells.items() if cell_name.rpartition("-")[0] == name]:
            lines.append(f"| {arm.title} | {len(own)} | {own[0]['steps']} | {_row(own)} |")
    lines += [f"\n{name} was not merged: {cell['refused']}" for name, cell in cells.items() if cell["refused"]]
    return "\n".join([*lines, "", f"Measured on {machines(cells)}. `python -m benchmarks.objectives`"]) + "\n"


def _row(cells: list[Cell]) -> str:
    def side(name: str, key: str, digits: int, factor: float) -> str:
        values = [factor * cell["metrics"][name][key] for cell in cells if key in cell["metrics"][name]]
        return scatter(values, digits) if values else ""

    figures = []
    for _, key, digits, factor in FIGURES:
        both = [side(name, key, digits, factor) for name in ("base", "adapter")]
        figures.append(" → ".join(found for found in both if found) or "–")
    merged = [cell["merge"] for cell in cells if cell["merge"]]
    kept = [scatter([one["kl"] for one in merged], 4), scatter([100 * one["top1_agreement"] for one in merged], 1)]
    return " | ".join(
        [
            *figures,
            *(kept if merged else ["–", "–"]),
            f"{len(merged)} of {len(cells)}",
            f"{numpy.mean([cell['seconds']['train'] for cell in cells]):.0f}",
        ]
    )


if __name__ == "__main__":
    main()
