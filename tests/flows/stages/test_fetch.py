"""fetch: an ordinary folder that stops at its end of turn, the same bytes each time, and the old one on a failure."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from flows.errors import DataError
from flows.params import Base, Data, Params
from flows.paths import Paths
from flows.stages.fetch import run, settle_special_tokens
from peftcore.files import MANIFEST, damaged_files

PARAMS = Params(base=Base(source="path:source"))


@pytest.fixture
def paths(tmp_path: Path, tiny_base: Path) -> Paths:
    tiny_base.rename(tmp_path / "source")
    return Paths(tmp_path)


def test_the_folder_is_whole_bfloat16_and_has_its_manifest(paths: Paths) -> None:
    run(PARAMS, paths)
    model = AutoModelForCausalLM.from_pretrained(paths.base)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert AutoTokenizer.from_pretrained(paths.base).chat_template
    assert damaged_files(paths.base) == []
    assert (paths.base / MANIFEST).read_text().count("\n") == len(list(paths.base.iterdir())) - 1


def test_two_runs_write_the_same_bytes(paths: Paths) -> None:
    run(PARAMS, paths)
    first = (paths.base / MANIFEST).read_text()
    run(PARAMS, paths)
    assert (paths.base / MANIFEST).read_text() == first


def test_no_file_says_where_the_source_was(paths: Paths) -> None:
    run(PARAMS, paths)
    for file in paths.base.iterdir():
        assert str(paths.root).encode() not in file.read_bytes(), file.name


def test_generation_stops_at_the_end_of_a_turn_and_pads_with_something_else(paths: Paths) -> None:
    run(PARAMS, paths)
    tokenizer = AutoTokenizer.from_pretrained(paths.base)
    written = json.loads((paths.base / "generation_config.json").read_text())
    assert written["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.pad_token == "<|endoftext|>"
    assert written["pad_token_id"] == tokenizer.pad_token_id
    assert tokenizer.model_max_length == 1024


def test_other_ends_of_the_model_still_stop_it(tiny_base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.generation_config.eos_token_id = [0]
    settle_special_tokens(model, tokenizer)
    assert model.generation_config.eos_token_id == [2, 0]
    assert tokenizer.pad_token_id == 2  # nothing else is free: 0 ends, and chats hold 1


def test_a_template_that_cannot_be_used_leaves_the_old_base(paths: Paths) -> None:
    run(PARAMS, paths)
    before = (paths.base / MANIFEST).read_text()
    data = Data(source="rows.jsonl", chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(DataError, match="ends an assistant turn with no special token"):
        run(PARAMS.model_copy(update={"data": data}), paths)
    assert (paths.base / MANIFEST).read_text() == before
    assert [path.name for path in paths.artifacts.iterdir()] == ["base"]


def test_a_base_without_a_chat_template_ends_with_its_own_token(paths: Paths, caplog: pytest.LogCaptureFixture) -> None:
    (paths.root / "source" / "chat_template.jinja").unlink()
    run(PARAMS, paths)
    assert "path:source has no chat template; chats need data.chat_template" in caplog.text
    written = json.loads((paths.base / "generation_config.json").read_text())
    assert written["eos_token_id"] == 2 != written["pad_token_id"]


def test_a_full_disk_leaves_the_old_base(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    run(PARAMS, paths)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flows.stages.fetch.write_manifest", full)
    with pytest.raises(OSError, match="No space left"):
        run(PARAMS, paths)
    assert damaged_files(paths.base) == []
    assert [path.name for path in paths.artifacts.iterdir()] == ["base"]
