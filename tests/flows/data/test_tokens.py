"""Tokenised rows of each kind: identity by text, sequences with their labels, and columns of the file."""

import pytest

from flows.data.encoders import COLUMNS, Kind
from flows.data.tokens import IGNORED, AnyTokens, PairTokens, TextTokens, Tokens, length

CHAT = Tokens([1, 2, 3], [IGNORED, IGNORED, 3], 2, "question", "answer")
PAIR = PairTokens("question", "good", "bad", 2, [([1, 2, 3, 4], [IGNORED, IGNORED, 3, 4]), ([1, 2, 5], [IGNORED] * 3)])
TEXT = TextTokens("text", [1, 2], 1, "warm")
KINDS: dict[Kind, AnyTokens] = {"chat": CHAT, "preference": PAIR, "classification": TEXT}


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_columns_of_its_kind(kind: Kind) -> None:
    tokens = KINDS[kind]
    assert COLUMNS[kind].keys() - {"id", "slice", "group", "weight"} <= tokens.columns().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_label_is_the_token_itself_or_ignored(kind: Kind) -> None:
    for ids, labels in KINDS[kind].parts:
        assert len(ids) == len(labels)
        assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))


def test_an_id_is_of_the_text_and_not_of_its_tokens() -> None:
    """Another tokenizer or another limit leaves a row what it is."""
    assert Tokens([9], [IGNORED], 0, "question", "answer").id == CHAT.id
    assert TextTokens("text", [9], 0, "warm").id == TEXT.id
    assert PairTokens("question", "good", "bad", 0, []).id == PAIR.id


def test_texts_that_differ_only_in_where_they_end_have_different_ids() -> None:
    ids = {Tokens([], [], 0, *texts).id for texts in (("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc"))}
    assert len(ids) == 4


def test_a_pair_that_is_turned_round_is_another_row() -> None:
    assert PairTokens("question", "bad", "good", 2, PAIR.parts).id != PAIR.id


@pytest.mark.parametrize(
    ("tokens", "question", "answer"),
    [(CHAT, "question", "answer"), (PAIR, "question", "good\nbad"), (TEXT, "text", "warm")],
)
def test_question_and_answer_are_what_a_row_asks_and_teaches(tokens: AnyTokens, question: str, answer: str) -> None:
    assert (tokens.question, tokens.answer) == (question, answer)


def test_the_length_is_that_of_the_longest_sequence() -> None:
    assert [length(tokens) for tokens in (CHAT, PAIR, TEXT)] == [3, 4, 2]


def test_a_pair_has_columns_for_either_answer() -> None:
    columns = PAIR.columns()
    assert (columns["chosen_input_ids"], columns["rejected_input_ids"]) == ([1, 2, 3, 4], [1, 2, 5])
    assert (columns["chosen_labels"], columns["rejected_labels"]) == ([IGNORED, IGNORED, 3, 4], [IGNORED] * 3)


def test_nothing_of_a_labelled_text_is_supervised() -> None:
    [(_, labels)] = TEXT.parts
    assert labels == [IGNORED, IGNORED]
