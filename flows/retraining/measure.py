"""`python -m flows.retraining.measure REQUEST`: how new files of rows differ from those before, in its own process.

REQUEST is a JSON file: {"fresh": [file, ...], "rows": of each file that the champion is measured on, "champion":
{"root": where its adapter and its classes lie, "params": those that it is measured with} or null, "out": the JSON file
to write}. A champion of another base or another kind of rows is not measured, nor are rows of classes that it does not
know. It runs in the pipeline's folder, as a stage does, after the base has been fetched.
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

from flows.base.model import load_dequantized, load_tokenizer, padding_id
from flows.data.encoders import encoder_of, label_names
from flows.data.examples import AnyExample
from flows.data.rows import Row
from flows.data.sources import comes_from, read_examples
from flows.data.splits import rank
from flows.data.tokens import AnyTokens, length
from flows.errors import DataError
from flows.params import Params
from flows.paths import Paths
from flows.runtime.progress import progress
from flows.runtime.stage import start
from flows.stages.reevaluate import adapter_losses
from flows.training.objectives import class_names
from peftcore import PeftModel
from peftcore.files import write_atomically

logger = logging.getLogger("flows.drift")
MOST = 2000
"""Rows of a side that lengths and words are counted on."""


def run(params: Params, paths: Paths) -> None:
    """Measure as the request says. Raises DataError for rows that cannot be read."""
    request = json.loads(Path(sys.argv[1]).read_text())
    tokenizer = load_tokenizer(paths.base)
    examples = read_examples(params.data, paths.root)
    encoder = encoder_of(params.data, tokenizer, label_names(examples))

    def encoded(of: Sequence[AnyExample]) -> list[AnyTokens]:
        rows = []
        for example in of:
            try:
                rows.append(encoder.encode(example))
            except DataError as error:  # the prepare stage says which rows these are
                logger.warning("%s: %s", example.where, error)
        return sorted(rows, key=lambda row: rank(params.project.seed, row.id))[:MOST]

    fresh = {name: encoded([one for one in examples if comes_from(one.where, [name])]) for name in request["fresh"]}
    older = encoded([one for one in examples if not comes_from(one.where, request["fresh"])])
    found: dict[str, Any] = {
        "older": {"rows": len(older), "length": _quantiles(older)} if older else None,
        "files": {name: _differences(rows, older) for name, rows in fresh.items() if rows},
    }
    if champion := request["champion"]:
        theirs, root = Params.model_validate(champion["params"]), Path(champion["root"])
        if theirs.data.kind == params.data.kind:
            for name, losses in _losses(theirs, Paths(root), paths.base, fresh, request["rows"]).items():
                found["files"][name] |= losses
    write_atomically(Path(request["out"]), json.dumps(found, indent=2) + "\n")


def _quantiles(rows: Sequence[AnyTokens]) -> dict[str, float]:
    median, high = numpy.quantile([length(row) for row in rows], [0.5, 0.9])
    return {"median": float(median), "p90": float(high)}


def _differences(rows: Sequence[AnyTokens], older: Sequence[AnyTokens]) -> dict[str, Any]:
    """Lengths (tokens) and words against those of older rows."""
    told: dict[str, Any] = {"rows": len(rows), "length": _quantiles(rows)}
    if not older:
        return told
    test: Any = ks_2samp([length(row) for row in rows], [length(row) for row in older])
    now, before = _words(rows), _words(older)
    every = sorted(now | before)
    sides = [numpy.array([side[word] for word in every], dtype=float) for side in (now, before)]
    return told | {
        "length_distance": float(test.statistic),
        "length_p": float(test.pvalue),
        "divergence": float(jensenshannon(*sides, base=2) ** 2),
        "unseen_words": sum(count for word, count in now.items() if word not in before) / max(1, sum(now.values())),
    }


def _words(rows: Sequence[AnyTokens]) -> Counter[str]:
    return Counter(word for row in rows for word in re.findall(r"\w+", f"{row.question} {row.answer}".lower()))


def _losses(
    params: Params, champion: Paths, base: Path, fresh: dict[str, list[AnyTokens]], count: int
) -> dict[str, dict[str, float]]:
    """The champion's loss (nats, of its own objective) on each file's first rows, and its standard error over rows."""
    labels = class_names(params, champion)
    model = PeftModel.from_pretrained(load_dequantized(base, params.quantization, labels), champion.adapter).eval()
    pad = padding_id(load_tokenizer(base))
    chosen = {name: _judged(rows, params.data.max_length, labels)[:count] for name, rows in fresh.items()}
    found = {}
    with progress(sum(map(len, chosen.values())), "the champion on new rows", unit="row") as bar:
        for name, rows in chosen.items():
            if not rows:
                continue
            losses = adapter_losses(params, model, rows, pad, bar)
            if not (weight := sum(losses.weights)):  # none of its rows counts
                continue
            error = float(numpy.std(losses.means, ddof=1) / len(rows) ** 0.5) if len(rows) > 1 else float("nan")
            told = {"loss": losses.loss, "loss_weight": weight, "loss_error": error, "measured_rows": len(rows)}
            found[name] = told
    return found


def _judged(rows: Sequence[AnyTokens], longest: int, labels: list[str] | None) -> list[Row]:
    """Those that the champion can judge; a class by the number that it has there."""
    columns = [row.columns() for row in rows if length(row) <= longest]
    if labels is None:
        return columns
    numbers = {name: number for number, name in enumerate(labels)}
    return [row | {"label": numbers[row["label_name"]]} for row in columns if row["label_name"] in numbers]


if __name__ == "__main__":
    start(run)
