"""Divergence from the teacher on held-out rows: by hand from whole forward passes, for each kind of teacher."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from flows.data.chat import ChatTokenizer
from flows.data.examples import question_and_answer
from flows.data.rows import Row
from flows.errors import StageError
from flows.evaluation.chats import evaluate_chats
from flows.evaluation.divergence import divergences, with_divergence
from flows.params import Params
from flows.paths import Paths
from peftcore.train import token_divergences


@pytest.fixture
def rows(tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    made = []
    for question, answer in (("One?", "1."), ("Two?", "That is 2."), ("Three?", "3")):
        tokens = ChatTokenizer(tokenizer).tokenize(question_and_answer(question, answer, None))
        made.append(tokens.columns() | {"id": tokens.id, "slice": "all", "weight": 1.0})
    return made


def params_of(answering: Callable[..., Params], teacher: str) -> Params:
    return answering(train={"distillation": {"teacher": teacher, "divergence": "reverse_kl"}})


def logits(model: Any, row: Row) -> torch.Tensor:
    labels = torch.tensor(row["labels"])[1:]
    with torch.no_grad():
        return model(torch.tensor([row["input_ids"]])).logits[0, :-1][labels != -100]


def test_the_base_as_teacher(
    adapted: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Row], answering: Callable[..., Params], tmp_path: Path
) -> None:
    params = params_of(answering, "base")
    before = evaluate_chats(params, adapted, tokenizer, rows)
    result = with_divergence(before, params, Paths(tmp_path), adapted, tokenizer, rows)
    expected = []
    for row in rows:
        student = logits(adapted, row)
        with adapted.disable_adapter():
            teacher = logits(adapted, row)
        expected.append(token_divergences(student, teacher, "reverse_kl").mean().item())
    table = result.table.to_pylist()
    assert [line["adapter_divergence"] for line in table] == pytest.approx(expected, rel=1e-6)
    assert max(line["base_divergence"] for line in table) < 1e-9
    assert result.metrics["adapter"]["divergence"] == pytest.approx(sum(expected) / 3)
    assert result.metrics["gain"] == before.metrics["gain"]


def test_a_version_as_teacher_is_read_from_the_start_stage(
    adapted: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Row], answering: Callable[..., Params], tmp_path: Path
) -> None:
    params, paths = params_of(answering, "v0.1.0"), Paths(tmp_path)
    with pytest.raises(StageError, match=r"teacher is v0\.1\.0, and .* has none"):
        divergences(params, paths, adapted, tokenizer, rows)
    adapted.save_pretrained(paths.teacher_adapter)
    paths.teacher_source.write_text('{"version": "v0.1.0"}')
    values = divergences(params, paths, adapted, tokenizer, rows)
    assert max(values["adapter"]) < 1e-6 < min(values["base"])  # the teacher is the same adapter
    assert list(adapted.peft_config) == ["default"] and adapted.active_adapters == ["default"]


def test_another_model_as_teacher(
    adapted: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    answering: Callable[..., Params],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from flows.evaluation import divergence

    base = adapted.get_base_model() if hasattr(adapted, "get_base_model") else adapted.base_model
    torch.manual_seed(9)
    other = type(base)(base.config).double().eval()
    monkeypatch.setattr(divergence, "load_other_model", lambda source, paths: other)
    values = divergences(params_of(answering, "path:large"), Paths(tmp_path), adapted, tokenizer, rows)
    expected = [token_divergences(logits(adapted, row), logits(other, row), "reverse_kl").mean().item() for row in rows]
    assert values["adapter"] == pytest.approx(expected, rel=1e-6)
