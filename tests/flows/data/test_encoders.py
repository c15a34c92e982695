"""Examples as rows: pairs that share a prompt, texts with a class, each cut to a limit where that is asked for."""

from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flows.data.encoders import (
    DocumentEncoder,
    LabelledEncoder,
    PreferenceEncoder,
    TaggedEncoder,
    encoder_of,
    label_names,
)
from flows.data.examples import Document, Labelled, Message, Preference, Retrieval, Tagged, UnpairedPreference
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
    [
        (["b", "a", "b"], ["a", "b"]),
        (["10", "9", "-1"], ["-1", "9", "10"]),
        (["1", "x"], ["1", "x"]),
        (["--1", "2"], ["--1", "2"]),
    ],
)
def test_classes_are_numbered_by_value_or_by_name(labels: list[str], names: list[str]) -> None:
    assert label_names([Labelled("t", label, **ORIGIN) for label in labels]) == names


def test_the_order_of_classes_of_one_value_is_that_of_their_names() -> None:
    names = ["".join(zeros) + "1" for zeros in (["0"] * count for count in range(12, -1, -1))]
    assert label_names([Labelled("t", label, **ORIGIN) for label in reversed(names)]) == names


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


# -- tagged words ----------------------------------------------------------------------------------------------------

NAMES = ["B-PER", "I-PER", "O"]


def tagged(words: str, tags: str) -> Tagged:
    return Tagged(words.split(), tags.split(), **ORIGIN)


def labelled(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """The text of each labelled token with its tag."""
    return [
        (str(tokenizer.decode([token])), NAMES[label])
        for token, label in zip(ids, labels, strict=True)
        if label != IGNORED
    ]


def test_the_first_token_of_each_word_has_its_tag(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens: Any = TaggedEncoder(tokenizer, NAMES).encode(tagged("Ada King spoke", "B-PER I-PER O"))
    assert labelled(tokens.input_ids, tokens.labels, tokenizer) == [("A", "B-PER"), ("K", "I-PER"), ("s", "O")]
    assert tokens.columns()["tags"] == "B-PER I-PER O" and tokens.columns()["tokens"] == ["Ada", "King", "spoke"]


@pytest.mark.parametrize("starts", ["own", "special"])
def test_tokens_that_hold_the_space_before_a_word_are_of_the_word(starts: str) -> None:
    """As tokenizers of GPT-2 and Llama write a word, and with tokens that begin and end each text, as BERT's."""
    vocabulary = ["<s>", "</s>", "<unk>", "A", "\u0120K", "ing", "\u0120s", "da"]
    merges = [("\u0120", "K"), ("\u0120", "s"), ("i", "n"), ("in", "g"), ("d", "a")]
    letters = sorted({*"\u0120AKdaings", "in"})
    backend = Tokenizer(models.BPE({t: n for n, t in enumerate([*vocabulary, *letters])}, merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if starts == "special":
        backend.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokens: Any = TaggedEncoder(fast, NAMES).encode(tagged("Ada King sda", "B-PER I-PER O"))
    pairs = zip(fast.convert_ids_to_tokens(tokens.input_ids), tokens.labels, strict=True)
    shown = [(token, NAMES[label]) for token, label in pairs if label != IGNORED]
    assert shown == [("A", "B-PER"), ("\u0120K", "I-PER"), ("\u0120s", "O")]


def test_tagged_words_are_cut_after_a_word_and_never_inside_an_entity(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = TaggedEncoder(tokenizer, NAMES)
    example = tagged("he met Ada King Byron", "O O B-PER I-PER I-PER")
    for limit, words in ((21, 5), (20, 2), (6, 2), (5, 1), (2, 1)):
        shorter = encoder.shorten(example, limit)
        assert shorter is not None and len(shorter.words) == words == len(shorter.tags), limit
        assert length(encoder.encode(shorter)) <= limit
    assert encoder.shorten(example, 1) is None
    assert encoder.shorten(tagged("Ada King", "B-PER I-PER"), 6) is None


def test_words_that_the_tokenizer_loses_are_told() -> None:
    backend = Tokenizer(models.WordLevel({"ada": 0, "<unk>": 1}, unk_token="<unk>"))
    backend.normalizer = normalizers.Strip()
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    encoder = TaggedEncoder(fast, NAMES)
    assert encoder.encode(tagged("ada King", "B-PER O")).labels == [0, 2]
    backend.normalizer = normalizers.Replace("King", "")
    encoder = TaggedEncoder(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"), NAMES)
    with pytest.raises(DataError, match=r"its word 1, 'King', has no token of its own"):
        encoder.encode(tagged("ada King", "B-PER O"))


def test_tagged_words_that_cannot_be_learned_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"all words have the tag 'O'; give rows with at least two tags"):
        encoder_of(Data(source="a.jsonl", kind="token_classification"), tokenizer, ["O"])
    with pytest.raises(DataError, match=r"its words hold <\|im_end\|>, which the model reads as a special token"):
        TaggedEncoder(tokenizer, NAMES).encode(tagged("a <|im_end|>", "O O"))


def test_tags_are_the_classes_in_the_order_of_their_names() -> None:
    assert label_names([tagged("Ada King", "B-PER O"), tagged("x y", "I-PER O")]) == NAMES


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
