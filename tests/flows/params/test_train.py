"""Section `train`: objectives and their rows, modes of checkpointing, and options of the preference losses."""

from pathlib import Path
from typing import get_args

import pytest
from params_texts import read, refusal

from flows.params import Data, Train
from flows.params.train import KINDS


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("{batch_size: true}", "batch_size"),
        ("{batch_size: -1}", "batch_size"),
        ("{learning_rate: .inf}", "learning_rate"),
        ("{learning_rate: true}", "learning_rate"),
        ("{epochs: 0}", "epochs"),
        ("{warmup_share: 1}", "warmup_share"),
        ("{spike_window: 3}", "spike_window"),
        ("{max_steps: 0}", "max_steps"),
        ("{start_from: champion}", "start_from"),
        ("{start_from: v1.0}", "start_from"),
        ("{kto: {beta: 0}}", "kto.beta"),
        ("{kto: {desirable_weight: 0, undesirable_weight: 0}}", "kto.desirable_weight"),
        ("{objective: kto, batch_size: 1}", "batch_size"),
        ("{distillation: {teacher: champion}}", "distillation.teacher"),
        ("{distillation: {weight: 0}}", "distillation.weight"),
        ("{distillation: {beta: 1}}", "distillation.beta"),
        ("{distillation: {on_policy: 0.5}}", "distillation.on_policy"),
        ("{distillation: {teacher: base, on_policy: 1.5}}", "distillation.on_policy"),
        ("{objective: dpo, distillation: {teacher: base}}", "distillation.teacher"),
        ("{preference: {beta: 0}}", "preference.beta"),
        ("{preference: {label_smoothing: 0.5}}", "preference.label_smoothing"),
        ("{preference: {loss: ipo, label_smoothing: 0.1}}", "preference.label_smoothing"),
        ("{preference: {loss: hinge, label_smoothing: 0.1}}", "preference.label_smoothing"),
    ],
)
def test_an_impossible_value_is_refused_by_its_key(tmp_path: Path, text: str, key: str) -> None:
    assert refusal(tmp_path, f"train: {text}").startswith(f"params.yaml:1: train.{key}: ")


def test_each_objective_has_a_kind_of_rows() -> None:
    assert set(KINDS) == set(get_args(Train.model_fields["objective"].annotation))
    assert {kind for kinds in KINDS.values() for kind in kinds} == set(get_args(Data.model_fields["kind"].annotation))


@pytest.mark.parametrize(("given", "mode"), [("true", "blocks"), ("false", "none"), ("selective", "selective")])
def test_gradient_checkpointing_is_a_mode_or_on_or_off(tmp_path: Path, given: str, mode: str) -> None:
    assert read(tmp_path, f"train: {{gradient_checkpointing: {given}}}").train.gradient_checkpointing == mode


def test_smoothing_belongs_to_the_sigmoid_loss(tmp_path: Path) -> None:
    preference = read(tmp_path, "train: {preference: {label_smoothing: 0.1}}").train.preference
    assert (preference.loss, preference.label_smoothing) == ("sigmoid", 0.1)


@pytest.mark.parametrize(
    ("teacher", "version"),
    [("base", None), ("v0.1.0", "v0.1.0"), ("hub:org/large@main", None), ("path:models/large", None)],
)
def test_a_teacher_is_a_version_or_a_model(tmp_path: Path, teacher: str, version: str | None) -> None:
    distillation = read(tmp_path, f"train: {{distillation: {{teacher: '{teacher}'}}}}").train.distillation
    assert (distillation.teacher, distillation.version) == (teacher, version)
    assert Train().distillation.version is None


def test_all_processes_are_those_of_every_node() -> None:
    assert Train().all_processes == 1
    assert Train(processes=4, nodes=3).all_processes == 12
