"""All checks of each kind of rows, and how they are run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from flows.base.folder import load_tokenizer
from flows.errors import DataError, StageError
from flows.params import Data, Params
from flows.paths import SPLITS, Paths, prepare_command
from flows.validation import balance, contents, duplicates, lengths, masks, retrieval, tags, targets, template
from flows.validation.findings import Finding, Findings
from flows.validation.prepared import Prepared, read_prepared
from peftcore.files import sha256

Check = Callable[[Prepared], Finding]
_ANY: tuple[Check, ...] = (
    lengths.lengths,
    lengths.too_long,
    duplicates.shared_rows,
    duplicates.near_duplicates_between_splits,
    duplicates.near_duplicates_in_train,
    balance.weights,
    contents.vocabulary,
    contents.characters,
)
_CHAT: tuple[Check, ...] = (
    masks.supervised,
    masks.mask,
    masks.end_of_turns,
    template.special_tokens,
    template.generation_prompt,
    template.round_trip,
)
CHECKS: dict[str, tuple[Check, ...]] = {
    "chat": (*_CHAT, *_ANY),
    "text": (masks.supervised, masks.mask, template.special_tokens, template.round_trip, *_ANY),
    "preference": (*_CHAT, balance.equal_pairs, balance.contradictory_pairs, balance.pair_lengths, *_ANY),
    "unpaired_preference": (
        *_CHAT,
        balance.desirable,
        balance.contradictory_answers,
        balance.answer_lengths,
        *_ANY,
    ),
    "retrieval": (
        template.special_tokens,
        template.round_trip,
        retrieval.passages,
        retrieval.repeated_queries,
        retrieval.shared_passages,
        retrieval.negatives,
        *_ANY,
    ),
    "classification": (template.special_tokens, template.round_trip, balance.classes, balance.contradictions, *_ANY),
    "token_classification": (
        tags.alignment,
        tags.known_tags,
        tags.entity_types,
        tags.scheme,
        template.special_tokens,
        template.round_trip,
        balance.contradictions,
        *_ANY,
    ),
    "seq2seq": (
        targets.ends,
        targets.texts,
        targets.limit,
        template.special_tokens,
        template.round_trip,
        *_ANY,
    ),
}
"""{data.kind: its checks, in order}"""


def examine(paths: Paths, params: Params) -> Findings:
    """Check the rows that the prepare stage wrote.

    Raises:
        StageError: There are no rows of `data.kind`.
        BaseModelError: There is no base, whose tokenizer is needed.
    """
    return examine_folder(paths.data, read_report(paths), load_tokenizer(paths.base), params.data)


def examine_folder(folder: Path, report: dict[str, Any], tokenizer: PreTrainedTokenizerBase, data: Data) -> Findings:
    """Check the splits of a folder. report: the report of `data_report` on them."""
    prepared = read_prepared(folder, report, tokenizer, data)
    findings = tuple(_run(check, prepared) for check in CHECKS[data.kind])
    return Findings(findings, {split: sha256(folder / f"{split}.parquet") for split in SPLITS})


def read_report(paths: Paths) -> dict[str, Any]:
    """Return the prepare stage's report. Raises StageError if there is none."""
    if not paths.data_report.exists():
        raise StageError(f"there is no {paths.data_report}; run `{prepare_command(paths.root)}` first")
    return json.loads(paths.data_report.read_text(encoding="utf-8"))


def _run(check: Check, prepared: Prepared) -> Finding:
    try:
        return check(prepared)
    except DataError as error:  # the template cannot be used at all
        return Finding(check.__name__.replace("_", " "), "error", str(error), 1, "give the tokenizer another template")
