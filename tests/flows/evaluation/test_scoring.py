import math
import random
import string

import pytest
import torch
from rouge_score.tokenizers import DefaultTokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from flows.evaluation.scoring import RowLosses, by_length, padding_multiple, rouge_l, row_losses, words_of


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).double().eval()


def rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in (5, 19, 8, 30, 12):
        ids = torch.randint(40, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    return made


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_rows_loss_is_its_own_whatever_it_is_batched_with(batch_size: int) -> None:
    judge = model()
    found = row_losses(judge, rows(), 0, batch_size)
    for row, mean, tokens in zip(rows(), found.means, found.tokens, strict=True):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        logits = judge(ids).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, labels)
        assert mean == pytest.approx(expected.item(), rel=1e-9)
        assert tokens == int((labels != -100).sum())


def test_on_a_cpu_no_padding_is_computed_beyond_the_longest_row(monkeypatch: pytest.MonkeyPatch) -> None:
    widths, judge = [], model()
    judge.register_forward_pre_hook(lambda _, __, inputs: widths.append(inputs["input_ids"].shape[1]), with_kwargs=True)
    row_losses(judge, rows(), 0, 1)
    assert set(widths) >= {5, 8, 12, 19, 30}
    assert padding_multiple(torch.device("cuda")) == 8


def test_the_loss_of_many_rows_weighs_tokens() -> None:
    losses = RowLosses([1.0, 4.0, 9.0], [3, 1, 100])
    assert losses.of([0, 1]).loss == pytest.approx(7 / 4)
    assert losses.of([0, 1]).perplexity == pytest.approx(math.exp(7 / 4))
    assert RowLosses([800.0], [1]).perplexity == math.inf


def test_rows_with_weights_weigh_their_tokens_times_these() -> None:
    found = row_losses(
        model(), [row | {"weight": w} for row, w in zip(rows(), (2.0, 0.0, 1.0, 0.5, 1.0), strict=True)], 0, 2
    )
    products = [n * w for n, w in zip(found.tokens, (2.0, 0.0, 1.0, 0.5, 1.0), strict=True)]
    assert found.weights == products
    assert found.loss == pytest.approx(sum(m * w for m, w in zip(found.means, products, strict=True)) / sum(products))
    assert math.isnan(found.of([1]).loss)


def test_batches_are_of_like_length_and_hold_each_row_once() -> None:
    batches = by_length([3, 9, 1, 7, 5], 2)
    assert batches == [[1, 3], [4, 0], [2]]


def test_batches_on_a_cpu_have_few_tokens() -> None:
    """One row, or as many as have 768 tokens when padded to the longest."""
    lengths = [900, 450, 300, 300, 150, 135, 120, 105, 90, 75]
    assert by_length(lengths, 4, torch.device("cpu")) == [[0], [1], [2, 3], [4, 5, 6, 7], [8, 9]]
    assert by_length(lengths, 4, torch.device("cuda")) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert by_length([0, 0], 4, torch.device("cpu")) == [[0, 1]]


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    # 3 words in common, in order, of 4 in the reference and of 6 in the answer: P = 1/2, R = 3/4, F = 2PR/(P+R)
    assert rouge_l(["Return the file position."], ["This will return the current position"]) == [pytest.approx(0.6)]
    assert rouge_l(["a b", "a"], ["a b", ""]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("reference", "answer", "value"),
    [
        ("北京是中国的首都", "上海是中国的城市", 4 / 8),  # a character is a word: 是中国的
        ("สวัสดี", "สวัสดี", 1.0),
        ("Привет, мир 5", "пока свет 5", 1 / 3),  # one of three words, although only 5 is ASCII
        ("مرحبا بالعالم", "مرحبا", 2 / 3),
        ("हिन्दी में", "हिन्दी", 2 / 3),
        ("Café", "cafe\u0301", 1.0),
        ("café", "caf", 0.0),
    ],
)
def test_rouge_l_knows_the_words_of_every_script(reference: str, answer: str, value: float) -> None:
    assert rouge_l([reference], [answer]) == [pytest.approx(value)]


def test_rouge_l_of_ascii_texts_is_that_of_rouge_score() -> None:
    tokenizer, characters = DefaultTokenizer(use_stemmer=False), random.Random(0)
    for _ in range(300):
        text = "".join(characters.choices(string.printable, k=40))
        assert words_of(text) == tokenizer.tokenize(text)
