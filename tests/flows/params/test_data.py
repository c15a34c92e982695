"""Section `data`: where rows come from, and shares and limits that leave each split its rows."""

from pathlib import Path

import pytest
from params_texts import read, refusal
from pydantic import ValidationError

from flows.params import DEMONSTRATION_PROMPT, Data, Params, source_names


@pytest.mark.parametrize("source", ["hub:a/b", "hub:a/b@main", "data/chats.jsonl", "folder", "stdlib:docstrings"])
def test_each_kind_of_source_is_taken(tmp_path: Path, source: str) -> None:
    assert read(tmp_path, f"data: {{source: '{source}'}}").data.source == source


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("{validation_share: 0.6, test_share: 0.4}", "test_share"),
        ("{validation_share: 0}", "validation_share"),
        ("{max_length: 0}", "max_length"),
        ("{test_rows: 0}", "test_rows"),
        ("{source: stdlib:docstring}", "source"),
        ("{source: s3://bucket/rows.jsonl}", "source"),
        ("{source: ''}", "source"),
        ("{source: 'hub:--upload'}", "source"),
        ("{kind: preference}", "kind"),
        ("{source: a.jsonl, kind: chats}", "kind"),
        ("{similarity: 0}", "similarity"),
        ("{similarity: 1.1}", "similarity"),
        ("{max_leakage: 1}", "max_leakage"),
        ("{new_files: ['']}", "new_files.0"),
        ("{reasoning: drop}", "reasoning"),
        ("{source: mixture}", "source"),
        ("{source: a.jsonl, mixture: [{source: b.jsonl}]}", "source"),
        ("{mixture: [{source: a.jsonl}, {source: b/a.jsonl}]}", "mixture.1.name"),
        ("{mixture: [{source: a.jsonl, rows: 3}, {source: b.jsonl}]}", "mixture.1.rows"),
        ("{mixture: [{source: a.jsonl, rows: 3, weight: 1}]}", "mixture.0.rows"),
        ("{mixture: [{source: a.jsonl, rows: 1300}]}", "train_rows"),
        ("{mixture: [{source: 's3://a'}]}", "mixture.0.source"),
        ("{mixture: [{source: a.jsonl, weigth: 2}]}", "mixture.0.weigth"),
        ("{mixture: [{source: a.jsonl, weight: 0}]}", "mixture.0.weight"),
        ("{mixture: [{source: a.jsonl}], new_files: [a]}", "new_files"),
        ("{source: a.txt, kind: text, supervise: last}", "supervise"),
        ("{source: a.txt, kind: text, system_prompt: a}", "system_prompt"),
        ("{source: a.csv, kind: classification, system_prompt: a}", "system_prompt"),
        ("{source: a.csv, kind: token_classification, ignored_fields: [a]}", "ignored_fields"),
        ("{source: a.csv, kind: seq2seq, reasoning: none}", "reasoning"),
        ("{source: a.txt, kind: text, overlong: truncate}", "overlong"),
        ("{ignored_fields: [id, content]}", "ignored_fields"),
        ("{special_tokens: [a, a]}", "special_tokens"),
        ("{special_tokens: [' a']}", "special_tokens"),
        ("{chat_template: ''}", "chat_template"),
    ],
)
def test_an_impossible_value_is_refused_by_its_key(tmp_path: Path, text: str, key: str) -> None:
    assert refusal(tmp_path, f"data: {text}").startswith(f"params.yaml:1: data.{key}: ")


def test_shares_leave_rows_to_train_on() -> None:
    assert Data(validation_share=0.5, test_share=0.49).test_share == 0.49
    with pytest.raises(ValidationError, match="must be below 1"):
        Data(validation_share=0.5, test_share=0.5)


def test_a_drive_letter_is_a_path_and_no_scheme() -> None:
    assert Data(source="c:rows.jsonl").source == "c:rows.jsonl"


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("./data/rows.jsonl", "data/rows.jsonl"),
        ("data//rows/", "data/rows"),
        ("data/./rows", "data/rows"),
        ("../rows", "../rows"),
        ("~/rows", "~/rows"),
        ("/srv/rows/", "/srv/rows"),
        (".", "."),
        ("hub:org/rows@main", "hub:org/rows@main"),
    ],
)
def test_a_path_is_written_as_git_writes_it(source: str, path: str) -> None:
    assert Data(source=source).source == path
    assert Data.model_validate({"mixture": [{"source": source}]}).mixture[0].source == path


def test_a_prompt_that_nobody_gave_is_the_demonstrations_for_the_demonstration_alone() -> None:
    assert Data().system_prompt == Params().data.system_prompt == DEMONSTRATION_PROMPT
    assert Data(system_prompt=None).system_prompt is None
    assert Data(source="rows.jsonl").system_prompt is None
    assert Params.model_validate({"data": {"source": "hub:org/rows"}}).data.system_prompt is None


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("data/tickets.jsonl", "tickets"),
        ("data/week 3", "week_3"),
        ("hub:org/rows@v1.2", "rows"),
        ("stdlib:docstrings", "docstrings"),
    ],
)
def test_a_source_of_a_mixture_has_the_name_of_its_file(source: str, name: str) -> None:
    data = Data.model_validate({"mixture": [{"source": source}]})
    assert (data.source, data.mixture[0].name, data.system_prompt) == ("mixture", name, None)
    assert source_names(data.model_dump()) == [source]
    assert source_names({"source": "a.jsonl"}) == ["a.jsonl"]
