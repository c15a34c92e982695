"""Fold the adapter into the base, and prove that the merged model still says what the adapter says.

An adapter trained on a quantised base has learnt to work with its rounding, so there are two bases to fold it into:
that base dequantised, or the one that was fetched. Both are measured; what is written is read back and measured too.
"""

import json
import logging
from dataclasses import asdict

from transformers import PreTrainedModel

from flows.base_model import (
    check_base,
    compute_dtype,
    load_dequantized,
    load_original,
    load_tokenizer,
    padding_id,
)
from flows.errors import StageError
from flows.fidelity import Fidelity, fidelity
from flows.params import Merge, Params
from flows.paths import Paths
from flows.progress import progress
from flows.rows import read_rows
from flows.stage import start
from peftcore import PeftModel
from peftcore.files import directory_written_atomically, write_atomically, write_manifest

log = logging.getLogger(__name__)

CANDIDATES = ("dequantized", "original")
BATCH_SIZE = 16
"""Rows whose predictions are held in memory twice."""


def run(params: Params, paths: Paths) -> None:
    """Merge; writes the merged model and the report, or nothing if the merged model is not faithful enough."""
    check_base(paths.base)
    rows = read_rows(paths.split("test"), ["input_ids", "labels"], params.merge.rows)
    tokenizer = load_tokenizer(paths.base)
    reference = PeftModel.from_pretrained(load_dequantized(paths.base, params.quantization), paths.adapter)

    with progress(3 * len(rows), "merge", "row") as bar:

        def measured(candidate: PreTrainedModel) -> Fidelity:
            return fidelity(reference, candidate, rows, padding_id(tokenizer), BATCH_SIZE, bar)

        figures = {name: measured(_merged(params, paths, name)) for name in CANDIDATES}
        _require(figures[params.merge.into], params.merge, figures)
        with directory_written_atomically(paths.merged) as folder:
            merged = _merged(params, paths, params.merge.into)
            merged.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            written = measured(load_original(folder, compute_dtype(params.quantization)))
            _require(written, params.merge, figures)
            write_manifest(folder)
    report = {"into": params.merge.into, **asdict(written)}
    report["candidates"] = {name: asdict(one) for name, one in figures.items()}
    write_atomically(paths.merge_report, json.dumps(report, indent=2) + "\n")
    log.info("merged into the %s base: %s", params.merge.into, _said(written))


def _merged(params: Params, paths: Paths, into: str) -> PreTrainedModel:
    if into == "dequantized":
        base = load_dequantized(paths.base, params.quantization)
    else:
        base = load_original(paths.base, compute_dtype(params.quantization))
    return PeftModel.from_pretrained(base, paths.adapter).merge_and_unload(safe_merge=True)


def _require(found: Fidelity, limits: Merge, figures: dict[str, Fidelity]) -> None:
    if found.kl <= limits.max_kl and found.top1_agreement >= limits.min_top1_agreement:
        return
    others = "; ".join(f"into {name}: {_said(one)}" for name, one in figures.items())
    raise StageError(
        f"the merged model strays from the adapter ({_said(found)}; merge.max_kl is {limits.max_kl}, "
        f"merge.min_top1_agreement is {limits.min_top1_agreement}), so nothing was written. Measured {others}. "
        "Change merge.into to the better one, or the limits if you accept it"
    )


def _said(one: Fidelity) -> str:
    return f"KL {one.kl:.4f}, top-1 agreement {one.top1_agreement:.3f} over {one.tokens} tokens"


if __name__ == "__main__":
    start(run)
