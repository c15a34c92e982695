"""merge: the adapter merged into the base, and a check that the merged model predicts like the adapted one.

An adapter trained on a quantised base compensates for its rounding, so there are three bases to merge into: the weights
that training saw, in 16 bits (dequantized); the 16-bit weights as fetched (original); and the 4- or 8-bit weights,
whose sum is rounded again (requantized). All are compared with the unmerged model on held-out rows. So is the model
read back from disk, unless its tensors and configuration are exactly those that were compared. For a base that is not
quantised the three are the same. A calibrated base is merged into as training saw it, or as fetched. A GGUF base is its
own original, and is merged into dequantised.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from transformers import PreTrainedModel

from flows.base.calibrated import calibrated_identity, check_adapter, trained_base
from flows.base.folder import check_base, load_tokenizer, padding_id
from flows.base.model import (
    compute_dtype,
    load_dequantized,
    load_for_evaluation,
    load_for_inference,
    load_original,
    with_merged_dtype,
)
from flows.errors import StageError
from flows.evaluation.embedding_fidelity import EmbeddingFidelity, embedding_fidelity
from flows.evaluation.fidelity import (
    Fidelity,
    Reference,
    class_fidelity,
    fidelity,
    reward_fidelity,
    same_function,
    tag_fidelity,
    target_fidelity,
)
from flows.evaluation.rerankers import reranker_fidelity
from flows.params import Merge, Params
from flows.paths import Paths
from flows.runtime.progress import progress
from flows.runtime.stage import start
from flows.training.objectives import merged_rows, model_outputs, objective_of, rows_of
from peftcore import PeftModel
from peftcore.bases import add_packed_copies, has_quantized_layers, keep_quantized_weights_trainable
from peftcore.cpu_decoding import use_compiled_code
from peftcore.files import directory_written_atomically, write_atomically, write_manifest

log = logging.getLogger("flows.merge")  # as a program this module is called __main__

SIXTEEN_BIT = ("dequantized", "original")
"""Candidates of `merge.into: best`; a model in 4 or 8 bits has to be requested by name."""
REQUANTIZED = "requantized"
ONLY_CANDIDATE = {"none": ("original",), "gguf": ("dequantized",)}
"""{storage: candidate}, for storages whose base exists in one precision only."""
COMPARISONS: dict[str, Callable[..., Fidelity]] = {
    "classification": class_fidelity,
    "reward": reward_fidelity,
    "token_classification": tag_fidelity,
    "seq2seq": target_fidelity,
}
"""{objective: function that compares two models}"""
BATCH_SIZE = 16
"""Rows per batch; their predictions are in memory twice."""


def run(params: Params, paths: Paths) -> None:
    """Merge; writes the merged model and the report, or nothing if the merged model is not faithful."""
    base = trained_base(paths, params.quantization)
    for folder in {paths.base, base}:
        check_base(folder)
    check_adapter(paths.adapter, calibrated_identity(base))
    rows = merged_rows(params, paths.split("test"), params.merge.rows)
    rows = objective_of(params).complete_rows(params, paths.base, rows)
    tokenizer, labels, task = load_tokenizer(paths.base), model_outputs(params, paths), rows_of(params).task
    compare = _comparison(params)
    adapted = PeftModel.from_pretrained(load_for_evaluation(base, params.quantization, labels, task), paths.adapter)
    reference = Reference(adapted, rows, padding_id(tokenizer), BATCH_SIZE)
    computed = compute_dtype(params.quantization)
    names = ONLY_CANDIDATE.get(params.quantization.storage, (*SIXTEEN_BIT, REQUANTIZED))

    with progress(len(names) * len(rows), "merge", "row") as bar:

        def compared(candidate: PreTrainedModel) -> Fidelity:
            if candidate.dtype != computed:
                candidate.to(computed)  # type: ignore[arg-type]
            if params.quantization.storage in ("nf4", "fp4") and has_quantized_layers(candidate):
                candidate = candidate.dequantize(computed)  # once; 4-bit layers do so in each forward
            keep_quantized_weights_trainable(candidate)  # makes a prompt's forward several times faster on a CPU
            add_packed_copies(candidate, exact=True)
            use_compiled_code(candidate)
            return compare(reference, candidate, bar)

        candidates = {name: compared(_merged(params, paths, name)) for name in names}
        into = _chosen(params.merge, candidates)
        with directory_written_atomically(paths.merged) as folder:
            merged = _merged(params, paths, into)
            merged.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            read_back = load_original(folder, merged.dtype, labels, task)
            written = candidates[into] if same_function(merged, read_back) else compared(read_back)
            if not _is_faithful(written, params.merge):
                raise _unfaithful(f"read back from disk, the model merged into {into}", params.merge, candidates)
            write_manifest(folder)
    report = {"into": into, **asdict(written)}
    report["candidates"] = {name: asdict(result) for name, result in candidates.items()}
    write_atomically(paths.merge_report, json.dumps(report, indent=2) + "\n")
    log.info("merged into the %s base: %s", into, written)


def _comparison(params: Params) -> Callable[..., Fidelity]:
    """Return the function that compares a candidate with the reference: (reference, candidate, bar)."""
    if params.train.objective == "embedding":
        return partial(embedding_fidelity, params)
    if params.train.objective == "reranker":
        return partial(reranker_fidelity, params)
    return COMPARISONS.get(params.train.objective, fidelity)


def _merged(params: Params, paths: Paths, into: str) -> PreTrainedModel:
    """Return the merged model as it is stored: in 16 bits unless the parameters name another type."""
    labels, folder = model_outputs(params, paths), trained_base(paths, params.quantization)
    task, stored = rows_of(params).task, with_merged_dtype(params.quantization)
    if into == "dequantized":
        base = load_dequantized(folder, stored, labels, task)
    elif into == REQUANTIZED:
        base = load_for_inference(folder, params.quantization, labels, task)
    else:
        base = load_original(paths.base, compute_dtype(stored), labels, task)
    return PeftModel.from_pretrained(base, paths.adapter).merge_and_unload(safe_merge=True)


def _chosen(merge: Merge, candidates: dict[str, Fidelity]) -> str:
    """Return the candidate to write. Raises StageError if no eligible candidate is faithful."""
    requested = SIXTEEN_BIT if merge.into == "best" else (merge.into,)
    eligible = requested if len(candidates) > 1 else tuple(candidates)
    faithful = [name for name in eligible if _is_faithful(candidates[name], merge)]
    if not faithful:
        raise _unfaithful(f"merged into {' or '.join(eligible)}, the model", merge, candidates)
    return min(faithful, key=lambda name: candidates[name].kl)


def _is_faithful(result: Fidelity, limits: Merge) -> bool:
    if isinstance(result, EmbeddingFidelity) and result.cosine < limits.min_cosine:
        return False
    return result.kl <= limits.max_kl and result.top1_agreement >= limits.min_top1_agreement


def _unfaithful(subject: str, limits: Merge, candidates: dict[str, Fidelity]) -> StageError:
    is_embedding = any(isinstance(result, EmbeddingFidelity) for result in candidates.values())
    cosine = f", merge.min_cosine {limits.min_cosine:g}" if is_embedding else ""
    measured = "; ".join(f"into {name}: {result}" for name, result in candidates.items())
    return StageError(
        f"{subject} differs from the adapter beyond merge.max_kl {limits.max_kl:g}{cosine} or merge.min_top1_agreement "
        f"{limits.min_top1_agreement:g}, so nothing was written. Measured {measured}. Set merge.into to a base that is "
        "within the limits, or raise the limits"
    )


if __name__ == "__main__":
    start(run)
