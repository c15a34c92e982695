"""Pairs of a reranker: tokens of both texts, and negatives drawn from other rows."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from flows.errors import StageError
from flows.training.reranking_pairs import with_pairs


def rows(count: int) -> list[dict[str, Any]]:
    return [{"query": f"Is it {n}?", "positive": f"It is {n}.", "negatives": []} for n in range(count)]


def texts(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> list[str]:
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in row["pairs_input_ids"]]


def test_a_row_has_its_own_passages_the_right_one_first(tokenizer: PreTrainedTokenizerBase) -> None:
    (row,) = with_pairs([rows(1)[0] | {"negatives": ["No.", "Never."]}], tokenizer, 4, 0)
    expected = [tokenizer("Is it 0?", text)["input_ids"] for text in ("It is 0.", "No.", "Never.")]
    assert row["pairs_input_ids"] == expected


def test_negatives_are_drawn_from_other_rows_by_the_seed_and_the_row(tokenizer: PreTrainedTokenizerBase) -> None:
    data = rows(8)
    data.append(data[0] | {"positive": "It is nothing."})  # a second right answer to the first query
    first = with_pairs(data, tokenizer, 3, 0)
    for row in first:
        right = {one["positive"] for one in data if one["query"] == row["query"]}
        passages = [text.removeprefix(row["query"]).strip() for text in texts(tokenizer, row)]
        assert passages[0] == row["positive"] and not right & set(passages[1:])
        assert len(set(passages)) == 4
    assert with_pairs(data[::-1], tokenizer, 3, 0)[::-1] == first  # whatever the order of the rows
    assert with_pairs(data, tokenizer, 3, 1) != first


def test_a_base_without_a_limit_cuts_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    expected = with_pairs(rows(4), tokenizer, 2, 0)
    tokenizer.model_max_length = int(1e30)  # as transformers has it for a tokenizer without one
    assert with_pairs(rows(4), tokenizer, 2, 0) == expected


def test_a_row_alone_has_nothing_to_be_compared_with(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(StageError, match="a row without negatives is alone in its split: give negatives"):
        with_pairs(rows(1), tokenizer, 4, 0)
