"""Pairs of a query and a passage, as a reranker reads them, from prepared rows of queries.

The first passage of a row is the right one, the others are its negatives. A row without negatives gets passages of
other rows, drawn by the seed, that are no right answer to its query.
"""

import logging
import random
from collections import defaultdict
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from flows.data.rows import Row
from flows.errors import StageError
from peftcore.train import PAIRS_COLUMN, TYPES_COLUMN

LONGEST = 2**31 - 1
"""Maximum tokens of a pair; the context of a base without a limit (1e30) is more than a fast tokenizer can count."""
log = logging.getLogger(__name__)


def with_pairs(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, negatives: int, seed: int) -> list[Row]:
    """Return the rows with the token ids of their pairs, and the token types if the model has them.

    A pair that is longer than the base's context loses tokens of its longer text.

    Args:
        rows: Prepared rows with query, positive and negatives.
        tokenizer: The base's tokenizer.
        negatives: Passages of other rows that a row without negatives gets, if there are as many.
        seed: Seed of the choice.

    Raises:
        StageError: A row has no negatives, and no other row has a passage for it.
    """
    candidates = [[row["positive"], *(row["negatives"] or ())] for row in rows]
    right: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        right[row["query"]].add(row["positive"])
    passages = sorted({row["positive"] for row in rows})
    for row, texts in zip(rows, candidates, strict=True):
        if len(texts) == 1:
            others = [text for text in _drawn(passages, negatives + len(right[row["query"]]), row, seed)
                      if text not in right[row["query"]]]  # fmt: skip
            if not others:
                raise StageError(
                    "train.objective reranker compares passages, and a row without negatives is alone in its split: "
                    "give negatives, or more rows"
                )
            texts += others[:negatives]
    longest = min(tokenizer.model_max_length, LONGEST)
    queries = [row["query"] for row, texts in zip(rows, candidates, strict=True) for _ in texts]
    encoded = tokenizer(
        queries,
        [text for texts in candidates for text in texts],
        truncation="longest_first",
        max_length=longest,
        return_token_type_ids="token_type_ids" in tokenizer.model_input_names,
    )
    ids, types = encoded["input_ids"], encoded.get("token_type_ids")
    cut = sum(len(one) == longest for one in ids)
    if cut:
        log.warning("%d of %d pairs are cut to the base's %d tokens", cut, len(ids), longest)
    result, start = [], 0
    for row, texts in zip(rows, candidates, strict=True):
        stop = start + len(texts)
        pairs = {PAIRS_COLUMN: ids[start:stop]} | ({} if types is None else {TYPES_COLUMN: types[start:stop]})
        result.append(row | pairs)
        start = stop
    return result


def _drawn(passages: list[str], count: int, row: Row, seed: int) -> list[str]:
    """Return passages drawn for a row, which do not depend on its place."""
    return random.Random(f"{seed}\0{row['query']}\0{row['positive']}").sample(passages, min(count, len(passages)))
