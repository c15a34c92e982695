"""The control set: plain texts of other topics, on which forgetting is measured.

The source `stdlib:topics` is the prose of the help topics that come with Python, such as `help("CLASSES")`. Other
sources are a .jsonl with a column `text`, or a .txt whose texts are separated by empty lines. No chat template is
applied, and every token counts.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from flows.base.folder import padding_id
from flows.errors import DataError
from flows.evaluation.scoring import RowLosses, row_losses, words_of
from flows.params import Control
from flows.params.scorers import WATCHED
from flows.runtime.progress import progress

CONTROL = pa.schema(
    [("id", pa.string()), ("tokens", pa.int32()), ("base_loss", pa.float64()), ("adapter_loss", pa.float64())]
)
"""Columns of control.parquet, one row per text; losses are mean nats per token."""
TOPICS = "stdlib:topics"
WORDS = 30
"""Minimum words of a paragraph of TOPICS; shorter ones are headings, code and list items."""
log = logging.getLogger(__name__)


def evaluate_control(
    control: Control, root: Path, model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> tuple[pa.Table, dict[str, Any]]:
    """Evaluate the base and the adapter on the control set.

    Args:
        control: The section `evaluate.control` of params.yaml; its source is not null.
        root: Folder from which a relative source path starts.
        model: A PeftModel; the adapter is disabled for the base.
        tokenizer: The base's tokenizer.
        batch_size: Texts per forward pass.

    Returns:
        The CONTROL table, and {"base_loss", "adapter_loss", "rows"} with means over all tokens (nats).

    Raises:
        DataError: The source cannot be read, or has no text of at least two words and two tokens.
    """
    encoded = {
        text: tokenizer(text, truncation=True, max_length=control.max_length)["input_ids"]
        for text in control_texts(control, root)
    }
    encoded = {text: ids for text, ids in encoded.items() if len(ids) > 1}  # the first token is not predicted
    if not encoded:
        raise DataError(f"evaluate.control.source {control.source}: each text is a single token; give longer texts")
    rows: list[dict[str, Any]] = [{"input_ids": ids, "labels": ids} for ids in encoded.values()]
    losses: dict[str, RowLosses] = {}
    with progress(2 * len(rows), "control set", "text") as bar:
        for name, context in (("base", model.disable_adapter()), ("adapter", contextlib.nullcontext())):
            with context:
                losses[name] = row_losses(model, rows, padding_id(tokenizer), batch_size, bar)
    columns = {
        "id": [hashlib.sha256(text.encode()).hexdigest()[:16] for text in encoded],
        "tokens": losses["base"].tokens,
        **{f"{name}_loss": side.means for name, side in losses.items()},
    }
    means = {f"{name}_loss": side.loss for name, side in losses.items()}
    return pa.table(columns, schema=CONTROL), {**means, "rows": len(rows)}


def control_texts(control: Control, root: Path) -> list[str]:
    """Return at most `control.rows` different texts of two words or more, spread evenly over the source.

    Args:
        control: The section `evaluate.control` of params.yaml; its source is not null.
        root: Folder from which a relative source path starts.

    Raises:
        DataError: The source cannot be read, or has no such text.
    """
    assert control.source is not None
    candidates = _topics() if control.source == TOPICS else _read(root, control.source)
    texts = [text for text in dict.fromkeys(candidates) if len(text.split()) > 1 or len(words_of(text)) > 1]
    if not texts:
        raise DataError(
            f"evaluate.control.source {control.source}: it has no text of at least two words; give another source"
        )
    count = min(control.rows, len(texts))
    return [texts[number * len(texts) // count] for number in range(count)]


def _topics() -> Iterator[str]:
    """Yield paragraphs of prose, in the order of the topics' names."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "evaluate.control.source stdlib:topics: this Python has no pydoc_data; give a file of texts, or null"
        ) from error
    for _, topic in sorted(topics.items()):
        for paragraph in topic.split("\n\n"):
            if not paragraph.startswith(" ") and "::=" not in paragraph and len(paragraph.split()) >= WORDS:
                yield " ".join(paragraph.split())


def _read(root: Path, source: str) -> Sequence[str]:
    path = root / Path(source).expanduser()
    if not path.resolve().is_relative_to((root / WATCHED).resolve()):
        log.warning(
            "evaluate.control.source %s is outside %s, which DVC watches: after changing it, run "
            "`peftcore stage evaluate --force`",
            source,
            WATCHED,
        )
    try:
        content = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".txt":
            return [text.strip() for text in content.split("\n\n")]
        texts = [json.loads(line)["text"] for line in content.split("\n") if line.strip()]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"evaluate.control.source {source}: it cannot be read ({error!r}); give a .txt of texts separated by empty "
            "lines, or a .jsonl whose rows have a `text`"
        ) from error
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"evaluate.control.source {source}: a row's `text` is not a string; give text")
    return texts
