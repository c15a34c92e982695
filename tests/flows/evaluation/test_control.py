"""The control set: the same prose each time, and the losses of plain next-token prediction."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from flows.errors import DataError
from flows.evaluation.control import control_texts, evaluate_control
from flows.params import Control
from peftcore import LoraConfig, get_peft_model


def test_topics_are_prose_the_same_each_time_and_spread_over_them(tmp_path: Path) -> None:
    texts = control_texts(Control(), tmp_path)
    assert texts == control_texts(Control(), tmp_path)
    assert len(set(texts)) == 48
    assert all(len(text.split()) >= 30 and "::=" not in text and "\n" not in text for text in texts)
    words = " ".join(texts).split()
    assert len({"the", "of", "is", "a"} & set(words)) == 4
    few = control_texts(Control(rows=4), tmp_path)
    assert len(few) == 4 and texts.index(few[1]) == 12, "a quarter of the way"


def test_files_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one two", "three four")))
    (tmp_path / "a.txt").write_text("one two\n\n\nthree\nfour\n\none two\n\nx\n")
    assert control_texts(Control(source="a.jsonl"), tmp_path) == ["one two", "three four"]
    assert control_texts(Control(source="a.txt"), tmp_path) == ["one two", "three\nfour"]


@pytest.mark.parametrize(("name", "content"), [("a.txt", "one two"), ("a.jsonl", '{"text": "one two"}')])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert control_texts(Control(source=name), tmp_path) == ["one two"]


def test_a_file_that_dvc_does_not_watch_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "project"
    (root / "data").mkdir(parents=True)
    for path in (root / "data" / "a.txt", root / "a.txt", tmp_path / "a.txt"):
        path.write_text("one two")
    for source in ("data/a.txt", "stdlib:topics"):
        control_texts(Control(source=source), root)
    assert not caplog.records
    for source in ("a.txt", "data/../a.txt", str(tmp_path / "a.txt")):
        control_texts(Control(source=source), root)
        warning = caplog.records[-1].getMessage()
        assert warning.startswith(f"evaluate.control.source {source} is outside data/, which DVC watches")


def test_a_line_separator_in_a_text_does_not_end_the_row(tmp_path: Path) -> None:
    texts = [f"one{mark} two" for mark in ("\u2028", "\u2029", "\x85")]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_text("\r\n".join(lines), newline="")
    assert control_texts(Control(source="a.jsonl"), tmp_path) == texts


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"words": 1}\n'),
        ("a.jsonl", '{"text": 1}\n'),
        ("a.jsonl", "[" * 10_000),
        ("a.jsonl", "no json\n"),
        ("a.txt", "\n\none\n"),
        ("gone.txt", ""),
    ],
)
def test_what_is_no_control_set_is_named(tmp_path: Path, name: str, content: str) -> None:
    if name != "gone.txt":
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rf"evaluate\.control\.source {name}: .*give"):
        control_texts(Control(source=name), tmp_path)


def test_texts_without_spaces_are_texts(tmp_path: Path, tokenizer) -> None:
    text = "北京是中国的首都。"
    (tmp_path / "a.txt").write_text(f"{text}\n\n北京")
    assert control_texts(Control(source="a.txt"), tmp_path) == [text, "北京"]
    config = LlamaConfig(vocab_size=len(tokenizer) + 1, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                         num_attention_heads=2)  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config).eval(), LoraConfig(r=2, target_modules=["q_proj"]))
    tokenizer.add_tokens(["北京"])  # so that the second text has one token, which nothing predicts
    table, _ = evaluate_control(Control(source="a.txt"), tmp_path, model, tokenizer, 2)
    assert table.column("tokens").to_pylist() == [len(tokenizer(text)["input_ids"]) - 1]
    (tmp_path / "a.txt").write_text("北京")
    with pytest.raises(DataError, match=r"a\.txt: each text is a single token"):
        evaluate_control(Control(source="a.txt"), tmp_path, model, tokenizer, 2)


def test_losses_are_of_every_token_but_the_first(tmp_path: Path, tokenizer) -> None:
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                         num_attention_heads=2)  # fmt: skip
    base = LlamaForCausalLM(config).double().eval()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    texts = ["The quick brown fox.", "Over and out, says she to him.", "A b"]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    table, metrics = evaluate_control(Control(source="a.txt", max_length=16), tmp_path, model, tokenizer, 2)
    total = {"base": 0.0, "adapter": 0.0}
    for text, row in zip(texts, table.to_pylist(), strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"][:16]])
        assert row["tokens"] == ids.shape[1] - 1
        for name, expected in (("adapter", model(ids).logits), ("base", None)):
            if expected is None:
                with model.disable_adapter():
                    expected = model(ids).logits
            loss = cross_entropy(expected[0, :-1], ids[0, 1:]).item()
            assert row[f"{name}_loss"] == pytest.approx(loss, rel=1e-6)
            total[name] += loss * row["tokens"]
    tokens = sum(table.column("tokens").to_pylist())
    assert metrics == {f"{name}_loss": pytest.approx(sum_ / tokens) for name, sum_ in total.items()} | {"rows": 3}
    assert metrics["base_loss"] != metrics["adapter_loss"]
    assert len(set(table.column("id").to_pylist())) == 3
