"""Examples as rows: pairs that share a prompt, texts with a class, each cut to a limit where that is asked for."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from flows.data.encoders import DocumentEncoder, LabelledEncoder, PreferenceEncoder, encoder_of, label_names
from flows.data.examples import Document, Labelled, Message, Preference, Retrieval, UnpairedPreference
from flows.data.tokens import IGNORED, length
from flows.errors import DataError
from flows.params import Data

ORIGIN: dict[str, Any] = {"group": "g", "slice": "all", "where": "here"}


def says(*contents: str) -> list[Message]:
    return [{"role": ("assistant", "user")[n % 2], "content": content} for n, content in enumerate(contents)]


def pair(question: str, chosen: list[Message], rejected: list[Message]) -> Preference:
    return Preference([{"role": "user", "content": question}], chosen, rejected, **ORIGIN)


def test_all_answers_after_the_prompt_are_supervised_and_none_before(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = [{"role": "user", "content": "a"}, *says("b", "c")]
    tokens = PreferenceEncoder(tokenizer).encode(Preference(prompt, says("d", "e", "f"), says("g"), **ORIGIN))
    texts = [tokenizer.decode([label for label in labels if label != IGNORED]) for _, labels in tokens.parts]
    assert texts == ["d<|im_end|>f<|im_end|>", "g<|im_end|>"]
    assert tokens.prompt.endswith("user\nc<|im_end|>\n<|im_start|>assistant\n")
    assert tokens.rejected == "g"
    assert tokens.chosen.startswith("d<|im_end|>")


def test_what_supervises_the_last_answer_alone_does_not_count_for_pairs(tokenizer: PreTrainedTokenizerBase) -> None:
    data = Data(source="a.jsonl", kind="preference", supervise="last")
    tokens: Any = encoder_of(data, tokenizer, []).encode(pair("a", says("d", "e", "f"), says("g")))
    assert tokens.prompt.endswith("user\na<|im_end|>\n<|im_start|>assistant\n")


def test_the_longer_of_a_pair_decides_how_much_of_the_question_stays(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = PreferenceEncoder(tokenizer)
    long = pair("x" * 200, says("yes"), says("no, " * 5))
    shorter = encoder.shorten(long, 100)
    assert shorter is not None
    assert length(encoder.encode(shorter)) == 100
    assert (shorter.chosen, shorter.rejected) == (long.chosen, long.rejected)
    assert encoder.shorten(pair("x", says("y" * 200), says("no")), 100) is None


def test_a_marked_answer_is_supervised_as_a_whole_and_its_prompt_is_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = encoder_of(Data(source="a.jsonl", kind="unpaired_preference", supervise="last"), tokenizer, [])
    prompt = [{"role": "user", "content": "a"}, *says("b", "x" * 200)]
    good, bad = (UnpairedPreference(prompt, says("d", "e", "f"), mark, **ORIGIN) for mark in (True, False))
    tokens: Any = encoder.encode(good)
    supervised = tokenizer.decode([label for label in tokens.labels if label != IGNORED])
    assert supervised == "d<|im_end|>f<|im_end|>" and tokens.columns()["desirable"] is True
    assert tokens.prompt.endswith("<|im_start|>assistant\n") and tokens.completion.startswith("d<|im_end|>")
    other = encoder.encode(bad)
    assert tokens.id != other.id and tokens.answer != other.answer and tokens.question == other.question
    shorter = encoder.shorten(good, 150)
    assert shorter is not None and length(encoder.encode(shorter)) == 150
    assert encoder.shorten(good, 20) is None


def test_a_text_is_cut_from_its_end(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = LabelledEncoder(tokenizer, ["a", "b"])
    shorter = encoder.shorten(Labelled("量" * 20, "b", **ORIGIN), 10)
    assert shorter is not None
    assert shorter.text == "量" * 3
    assert encoder.encode(shorter).label == 1
    assert encoder.shorten(Labelled("量", "b", **ORIGIN), 2) is None


def test_a_text_that_holds_a_special_token_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"holds <\|im_end\|>"):
        LabelledEncoder(tokenizer, ["a", "b"]).encode(Labelled("x<|im_end|>", "a", **ORIGIN))


@pytest.mark.parametrize(
    ("labels", "names"),
    [(["b", "a", "b"], ["a", "b"]), (["10", "9", "-1"], ["-1", "9", "10"]), (["1", "x"], ["1", "x"])],
)
def test_classes_are_numbered_by_value_or_by_name(labels: list[str], names: list[str]) -> None:
    assert label_names([Labelled("t", label, **ORIGIN) for label in labels]) == names


@pytest.mark.parametrize("limit", [8, 9, 10, 11, 1000])
def test_rows_of_a_text_join_to_the_text(tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
    text = "Grüße aus 東京, wo es 🌧️ regnet."
    encoder = DocumentEncoder(tokenizer)
    rows: Any = encoder.parts(Document(text=text, **ORIGIN), limit)
    assert "".join(row.prompt + row.completion for row in rows) == text
    ids = [token for row in rows for token in row.input_ids]
    assert ids == [*tokenizer(text)["input_ids"], 2]
    for row in rows:
        assert 1 < len(row.input_ids) <= limit and row.labels == row.input_ids
        assert row.prompt == tokenizer.decode(row.input_ids[: row.prompt_length])


def test_a_text_may_not_hold_a_special_token(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"<\|im_end\|>, which the model reads"):
        DocumentEncoder(tokenizer).parts(Document(text="a<|im_end|>b", **ORIGIN), 8)


def test_queries_and_passages_are_texts_of_their_own_and_cut_one_by_one(tokenizer: PreTrainedTokenizerBase) -> None:
    data = Data(source="rows.jsonl", kind="retrieval", system_prompt=None)
    encoder = encoder_of(data, tokenizer, [])
    example = Retrieval("Is it one?", "It is one and no more than one.", ("It is two.",), **ORIGIN)
    tokens = encoder.encode(example)
    assert [ids for ids, _ in tokens.parts] == [
        tokenizer(text)["input_ids"] for text in (example.query, example.positive, *example.negatives)
    ]
    shorter = encoder.shorten(example, len(tokens.parts[0][0]))
    assert isinstance(shorter, Retrieval) and shorter.query == example.query
    assert example.positive.startswith(shorter.positive) and len(shorter.positive) < len(example.positive)
    same = Retrieval("q", "one two three", ("one two four",), **ORIGIN)
    assert encoder.shorten(same, len(tokenizer("one two")["input_ids"])) is None  # the positive would be a negative
    with pytest.raises(DataError, match="which the model reads as a special token"):
        encoder.encode(Retrieval("q", f"a {tokenizer.all_special_tokens[0]}", (), **ORIGIN))
