"""Plain texts through the stages: a base without a chat template is trained on packed rows of whole texts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
from transformers import AutoTokenizer

from flows.errors import DataError
from flows.params import Params
from flows.paths import Paths
from flows.stages import evaluate, fetch, merge, prepare, train

TEXT: dict[str, Any] = {"kind": "text", "max_length": 64, "group_column": None, "slice_column": None}


def story(number: int) -> str:
    return f"Story {number}. " + " ".join(f"Day {day}: {number} and {day} are {number + day} ä." for day in range(6))


@pytest.fixture
def paths(tmp_path: Path, tiny_base: Path) -> Paths:
    (tiny_base / "chat_template.jinja").unlink()
    tiny_base.rename(tmp_path / "source")
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": story(number)}) + "\n" for number in range(30)))
    for number in range(30, 40):
        (folder / f"{number}.txt").write_text(story(number))
    return Paths(tmp_path)


def params_of(tiny_params: Callable[..., Params], **sections: dict[str, Any]) -> Params:
    data = TEXT | {"source": "rows", "near_duplicates": "keep"} | sections.pop("data", {})
    return tiny_params(base={"source": "path:source"}, data=data, **sections)


@pytest.mark.slow
def test_texts_are_packed_trained_evaluated_and_merged(paths: Paths, tiny_params: Callable[..., Params]) -> None:
    train_options = {"batching": "packed", "pack_tokens": 128, "max_steps": 12}
    merged = {"max_kl": 10.0, "min_top1_agreement": 0.0}
    params = params_of(tiny_params, data={"train_rows": None}, train=train_options, merge=merged)
    fetch.run(params, paths)
    prepare.run(params, paths)
    report = json.loads(paths.data_report.read_text())
    assert report["examples"] == 40 and report["splits"]["train"]["length"]["max"] == 64
    assert [finding for finding in report["doctor"]["findings"] if finding["severity"] == "error"] == []
    train.run(params, paths)
    evaluate.run(params, paths)
    metrics = json.loads(paths.evaluation_metrics.read_text())
    assert metrics["adapter"]["loss"] < metrics["base"]["loss"]
    assert metrics["generated_rows"] == 6
    merge.run(params, paths)
    assert json.loads(paths.merge_report.read_text())["tokens"] > 0


def test_every_token_of_a_text_is_learned_once_and_in_one_split(
    paths: Paths, tiny_params: Callable[..., Params]
) -> None:
    shown = {"train_rows": None, "validation_rows": None, "test_rows": None}
    params = params_of(tiny_params, data=shown)
    fetch.run(params, paths)
    prepare.run(params, paths)
    tokenizer = AutoTokenizer.from_pretrained(paths.base)
    splits: dict[str, set[str]] = {}
    count = 0
    for split in ("train", "validation", "test"):
        for row in parquet.read_table(paths.split(split)).to_pylist():
            assert row["labels"] == row["input_ids"] and 1 < len(row["input_ids"]) <= 64
            ids = [token for token in row["input_ids"] if token != tokenizer.eos_token_id]
            assert tokenizer.decode(ids) == row["prompt"] + row["completion"]
            splits.setdefault(row["group"], set()).add(split)
            count += len(row["input_ids"])
    assert all(len(names) == 1 for names in splits.values()) and len(splits) == 40
    assert count == sum(len(tokenizer(story(number))["input_ids"]) + 1 for number in range(40))


def test_chats_need_a_template(paths: Paths, tiny_params: Callable[..., Params]) -> None:
    chat = {"prompt": "a", "completion": "b"}
    (paths.root / "rows.jsonl").write_text(json.dumps(chat) + "\n")
    params = params_of(tiny_params, data={"kind": "chat", "source": "rows.jsonl"})
    fetch.run(params, paths)
    with pytest.raises(DataError, match=r"no chat template; give data\.chat_template"):
        prepare.run(params, paths)
