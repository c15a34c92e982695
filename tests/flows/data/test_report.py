"""The data report: counts, lengths, and rows whose supervised part is marked."""

from collections import Counter

from transformers import PreTrainedTokenizerBase

from flows.data.chat import ChatTokenizer
from flows.data.examples import question_and_answer
from flows.data.report import data_report, segments
from flows.data.splits import Row
from flows.params import Data
from flows.paths import Split


def rows(tokenizer: PreTrainedTokenizerBase, *lengths: int) -> list[Row]:
    chats = ChatTokenizer(tokenizer)
    return [
        Row(chats.tokenize(question_and_answer("q" * length, "a", None)), f"group{length}", "all") for length in lengths
    ]


def test_segments_mark_the_answer_with_its_end(tokenizer: PreTrainedTokenizerBase) -> None:
    [row] = rows(tokenizer, 2)
    assert segments(row.tokens.parts[0], tokenizer) == [
        ("<|im_start|>user\nqq<|im_end|>\n<|im_start|>assistant\n", False),
        ("a<|im_end|>", True),
    ]


def test_counts_and_lengths(tokenizer: PreTrainedTokenizerBase) -> None:
    splits: dict[Split, list[Row]] = {
        "train": rows(tokenizer, 1, 2, 3, 4, 5, 6),
        "validation": rows(tokenizer, 7),
        "test": rows(tokenizer, 8),
    }
    available: dict[Split, int] = {"train": 9, "validation": 1, "test": 1}
    report = data_report(Data(source="here"), 20, available, splits, Counter({"longer": 2}), tokenizer, [])
    train = report["splits"]["train"]
    lengths = [len(row.tokens.input_ids) for row in splits["train"]]
    assert (train["rows"], train["available"], train["groups"], train["tokens"]) == (6, 9, 6, sum(lengths))
    assert (train["length"]["min"], train["length"]["max"]) == (lengths[0], lengths[-1])
    assert train["supervised_tokens"] == 12
    assert train["supervised_share"] == round(12 / sum(lengths), 4)
    assert report["dropped"] == {"longer": 2}
    assert report["examples"] == 20
    assert len(report["rendered"]) == 5
    assert report["leakage"]["train-test"] == {"groups": 0, "prompts": 0}
