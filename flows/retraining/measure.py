"""Measure the drift of new files of rows, in a process of its own: `python -m flows.retraining.measure REQUEST`.

REQUEST is a JSON file with these keys:

    new_files: list of file names
    rows: number of rows per file for the champion's loss
    champion: {"root": folder of its adapter, classes and calibrated base, "params": parameters to measure it with}, or
        null
    out: the JSON file to write

A champion of another base or another kind of rows is not measured, nor one of embeddings: their loss grows with the
number of passages, and a new file has another number than the test rows. Rows with classes unknown to the champion are
skipped. The process runs in the pipeline's folder, as a stage does, after the base has been fetched.
"""

import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from scipy.spatial.distance import jensenshannon
from scipy.stats import ks_2samp

from flows.base.calibrated import calibrated_identity, check_adapter
from flows.base.folder import load_tokenizer, padding_id
from flows.base.model import load_for_evaluation
from flows.data.encoders import encoder_of, label_names
from flows.data.examples import AnyExample
from flows.data.rows import Row
from flows.data.sources import comes_from, read_examples
from flows.data.splits import rank
from flows.data.tokens import IGNORED, AnyTokens, length
from flows.errors import DataError
from flows.params import Params
from flows.params.train import WITH_CLASSES
from flows.paths import Paths
from flows.runtime.progress import progress
from flows.runtime.stage import start
from flows.stages.reevaluate import adapter_losses
from flows.training.objectives import class_names, model_outputs, objective_of, rows_of
from peftcore import PeftModel
from peftcore.files import write_atomically

logger = logging.getLogger("flows.drift")
MOST = 2000
"""Largest number of rows of new files, and of older files, whose lengths and words are counted."""


def run(params: Params, paths: Paths) -> None:
    """Measure the files of the request and write the result. Raises DataError if rows cannot be read."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(paths.base)
    examples = read_examples(params.data, paths.root)
    encoder = encoder_of(params.data, tokenizer, label_names(examples))

    def encoded(selected: Sequence[AnyExample]) -> list[AnyTokens]:
        rows = []
        for example in selected:
            try:
                rows += encoder.parts(example, params.data.max_length) or [encoder.encode(example)]
            except DataError as error:  # the prepare stage reports these rows
                logger.warning("%s: %s", example.where, error)
        return sorted(rows, key=lambda row: rank(params.project.seed, row.id))[:MOST]

    new_files = {
        name: encoded([one for one in examples if comes_from(one.where, [name])]) for name in request["new_files"]
    }
    older = encoded([one for one in examples if not comes_from(one.where, request["new_files"])])
    result: dict[str, Any] = {
        "older": {"rows": len(older), "length": _quantiles(older)} if older else None,
        "files": {name: _differences(rows, older) for name, rows in new_files.items() if rows},
    }
    if champion := request["champion"]:
        champion_params, root = Params.model_validate(champion["params"]), Path(champion["root"])
        if champion_params.data.kind == params.data.kind and champion_params.train.objective != "embedding":
            base = Paths(root).calibrated if champion_params.quantization.is_calibrated else paths.base
            for name, losses in _losses(champion_params, Paths(root), base, new_files, request["rows"]).items():
                result["files"][name] |= losses
    write_atomically(Path(request["out"]), json.dumps(result, indent=2) + "\n")


def _quantiles(rows: Sequence[AnyTokens]) -> dict[str, float]:
    median, high = numpy.quantile([length(row) for row in rows], [0.5, 0.9])
    return {"median": float(median), "p90": float(high)}


def _differences(rows: Sequence[AnyTokens], older: Sequence[AnyTokens]) -> dict[str, Any]:
    """Return the number and length quantiles of new rows, and their distances from older rows if there are any.

    The distances: Kolmogorov-Smirnov statistic and p-value of the lengths (tokens), Jensen-Shannon divergence of the
    words (bits), and the share of words that no older row has.
    """
    result: dict[str, Any] = {"rows": len(rows), "length": _quantiles(rows)}
    if not older:
        return result
    test: Any = ks_2samp([length(row) for row in rows], [length(row) for row in older])
    now, before = _words(rows), _words(older)
    every = sorted(now | before)
    sides = [numpy.array([side[word] for word in every], dtype=float) for side in (now, before)]
    return result | {
        "length_distance": float(test.statistic),
        "length_p": float(test.pvalue),
        "divergence": float(jensenshannon(*sides, base=2) ** 2),
        "unseen_words": sum(count for word, count in now.items() if word not in before) / max(1, sum(now.values())),
    }


def _words(rows: Sequence[AnyTokens]) -> Counter[str]:
    return Counter(word for row in rows for word in re.findall(r"\w+", f"{row.question} {row.answer}".lower()))


def _losses(
    params: Params, champion: Paths, base: Path, new_files: dict[str, list[AnyTokens]], count: int
) -> dict[str, dict[str, float]]:
    """Return the champion's loss (nats, of its own objective) on each file's first rows, with its standard error."""
    labels, outputs = class_names(params, champion), model_outputs(params, champion)
    check_adapter(champion.adapter, calibrated_identity(base))
    model = PeftModel.from_pretrained(
        load_for_evaluation(base, params.quantization, outputs, rows_of(params).task), champion.adapter
    ).eval()
    pad = padding_id(load_tokenizer(base))
    classes = labels if params.train.objective in WITH_CLASSES else None
    samples = {name: _judged(rows, params.data.max_length, classes)[:count] for name, rows in new_files.items()}
    complete = objective_of(params).complete_rows
    samples = {name: complete(params, base, rows) if rows else rows for name, rows in samples.items()}
    result = {}
    with progress(sum(map(len, samples.values())), "the champion on new rows", unit="row") as bar:
        for name, rows in samples.items():
            if not rows:
                continue
            losses = adapter_losses(params, model, rows, pad, bar)
            if not (weight := sum(losses.weights)):  # all rows have weight 0
                continue
            error = float(numpy.std(losses.means, ddof=1) / len(rows) ** 0.5) if len(rows) > 1 else float("nan")
            result[name] = {
                "loss": losses.loss,
                "loss_weight": weight,
                "loss_error": error,
                "measured_rows": len(rows),
            }
    return result


def _judged(rows: Sequence[AnyTokens], longest: int, labels: list[str] | None) -> list[Row]:
    """Return the rows that the champion can be measured on, with the champion's class numbers."""
    columns = [row.columns() for row in rows if length(row) <= longest]
    if labels is None:
        return columns
    numbers = {name: number for number, name in enumerate(labels)}
    if columns and "tags" in columns[0]:
        tags = [row["tags"].split() for row in columns]
        known = [(row, told) for row, told in zip(columns, tags, strict=True) if numbers.keys() >= set(told)]
        return [row | {"labels": _numbered(row["labels"], [numbers[tag] for tag in told])} for row, told in known]
    return [row | {"label": numbers[row["label_name"]]} for row in columns if row["label_name"] in numbers]


def _numbered(labels: Sequence[int], numbers: Sequence[int]) -> list[int]:
    """Return labels with other class numbers at the same places."""
    following = iter(numbers)
    return [IGNORED if label == IGNORED else next(following) for label in labels]


if __name__ == "__main__":
    start(run)
