"""What an objective learns from, and with what."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest

from flows.errors import StageError
from flows.params import Params
from flows.paths import Paths
from flows.training.objectives import (
    class_names,
    kto_objective,
    longest,
    loss_function,
    merged_rows,
    preference_objective,
    start_batch,
    start_rows,
    trainer_of,
    training_rows,
)
from peftcore.train import (
    AdapterTrainer,
    BradleyTerry,
    ClassificationTrainer,
    Distillation,
    DistillationTrainer,
    Dpo,
    GrpoTrainer,
    Kto,
    KtoTrainer,
    Orpo,
    PreferenceTrainer,
    RewardTrainer,
    SimPo,
)

CHAT = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}


KINDS = {
    "sft": "chat",
    "dpo": "preference",
    "orpo": "preference",
    "simpo": "preference",
    "kto": "unpaired_preference",
    "grpo": "chat",
    "classification": "classification",
    "reward": "preference",
}


def params(objective: str, **train: Any) -> Params:
    data = {"source": "rows.jsonl", "kind": KINDS[objective]}
    return Params.model_validate({"data": data, "train": {"objective": objective, **train}})


def written(folder: Path, rows: list[dict[str, Any]]) -> Paths:
    paths = Paths(folder)
    paths.data.mkdir(parents=True)
    for split in ("train", "validation"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), paths.split(split))
    return paths


def test_weights_are_kept_only_where_one_is_not_one(tmp_path: Path) -> None:
    alike = training_rows(params("sft"), written(tmp_path / "a", [CHAT | {"weight": 1.0}] * 3))
    assert alike["train"].column_names == ["input_ids", "labels"]
    apart = training_rows(params("sft"), written(tmp_path / "b", [CHAT | {"weight": 0.5}, CHAT | {"weight": 1.0}]))
    assert apart["train"]["weight"] == [0.5, 1.0] and "weight" in apart["validation"].column_names
    none = training_rows(params("sft"), written(tmp_path / "c", [CHAT]))
    assert none["train"].to_list() == [CHAT]


@pytest.mark.parametrize("objective", ["dpo", "orpo", "simpo", "kto", "classification"])
def test_rows_of_another_kind_are_refused(tmp_path: Path, objective: str) -> None:
    kind = KINDS[objective]  # as the parameters have it, and the rows that were prepared before have not
    with pytest.raises(
        StageError, match=rf"{objective}, which needs {kind} rows, .* holds chat rows; set data\.kind: {kind}"
    ):
        training_rows(params(objective), written(tmp_path, [CHAT]))


def test_the_loss_of_pairs_is_what_the_parameters_say() -> None:
    given = {"loss": "hinge", "beta": 0.3, "length_normalized": True, "rpo_alpha": 0.2}
    expected = Dpo(beta=0.3, loss="hinge", length_normalized=True, rpo_alpha=0.2)
    assert preference_objective(params("dpo", preference=given)) == expected
    assert preference_objective(params("orpo", preference={"beta": 0.3})) == Orpo(0.3)
    simpo = {"beta": 2.5, "gamma": 1.5, "rpo_alpha": 0.2}
    assert preference_objective(params("simpo", preference=simpo)) == SimPo(2.5, 1.5, 0.2)


def test_losses_that_cannot_be_compared_have_other_words() -> None:
    said = [
        loss_function(params("sft")),
        loss_function(params("dpo")),
        loss_function(params("dpo", preference={"beta": 0.3})),
        loss_function(params("orpo")),
        loss_function(params("simpo")),
        loss_function(params("kto")),
        loss_function(params("kto", kto={"undesirable_weight": 0.5})),
        loss_function(params("classification")),
    ]
    assert len(set(said)) == 8
    assert loss_function(params("sft", batch_size=3)) == said[0]


def test_each_objective_has_its_trainer(tmp_path: Path) -> None:
    rows = training_rows(
        params("classification"), written(tmp_path, [{"input_ids": [1], "label": i % 3 // 2} for i in range(6)])
    )
    labels = rows["train"]
    assert trainer_of(params("sft"), labels, None) == (AdapterTrainer, {})
    kind, options = trainer_of(params("dpo", preference={"precompute_reference": False}), labels, None)
    assert kind is PreferenceTrainer and options == {
        "objective": Dpo(),
        "reference": "base",
        "precompute_reference": False,
    }
    kind, options = trainer_of(
        params("classification", classification={"class_weights": "balanced"}), labels, ["a", "b"]
    )
    assert kind is ClassificationTrainer and options["class_weights"] == pytest.approx([0.75, 1.5])


def test_chats_with_a_teacher_have_a_trainer_of_their_own(tmp_path: Path) -> None:
    rows = training_rows(params("sft"), written(tmp_path, [CHAT]))["train"]
    given = {
        "teacher": "v0.1.0",
        "divergence": "jsd",
        "weight": 0.5,
        "nll_weight": 0.0,
        "temperature": 2.0,
        "beta": 0.3,
    }
    teacher = object()
    kind, options = trainer_of(params("sft", distillation=given), rows, None, teacher)
    assert kind is DistillationTrainer
    assert options == {"distillation": Distillation("jsd", 0.5, 0.0, 2.0, 0.3), "teacher": teacher}


MARKED = [{"input_ids": [1, 2, n], "labels": [-100, 2, n], "desirable": n % 3 == 0} for n in range(3, 12)]


def test_kto_has_its_loss_and_trainer(tmp_path: Path) -> None:
    given = {"loss": "apo_zero_unpaired", "beta": 0.3, "desirable_weight": 2.0, "undesirable_weight": 0.5}
    expected = Kto(0.3, "apo_zero_unpaired", 2.0, 0.5)
    assert kto_objective(params("kto", kto=given)) == expected
    rows = training_rows(params("kto"), written(tmp_path, MARKED))["train"]
    assert trainer_of(params("kto", kto=given), rows, None) == (
        KtoTrainer,
        {"objective": expected, "reference": "base"},
    )


@pytest.mark.parametrize(("weight", "warns"), [(1.0, True), (2.0, False), (2.6, False), (3.0, True)])
def test_weights_that_do_not_balance_the_answers_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, weight: float, warns: bool
) -> None:
    rows = training_rows(params("kto"), written(tmp_path, MARKED))["train"]  # three of nine are desirable
    trainer_of(params("kto", kto={"desirable_weight": weight}), rows, None)
    assert bool(caplog.records) is warns
    if warns:
        assert "desirable_weight should be 2.00 to 2.67 times" in caplog.text


def test_only_good_answers_start_an_adapter_and_all_compare_a_merged_model(tmp_path: Path) -> None:
    paths = written(tmp_path, MARKED)
    rows = training_rows(params("kto"), paths)["train"]
    assert [row["input_ids"][2] for row in start_rows(params("kto"), rows, 2)] == [3, 6]
    compared = merged_rows(params("kto"), paths.split("train"), 4)
    assert compared == [{name: row[name] for name in ("input_ids", "labels")} for row in MARKED[:4]]


def test_marked_answers_are_no_chats(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"sft, which needs chat rows, .* holds unpaired_preference rows"):
        training_rows(params("sft"), written(tmp_path, MARKED))


def test_classes_are_those_that_prepare_wrote(tmp_path: Path) -> None:
    paths = written(tmp_path, [CHAT])
    assert class_names(params("dpo"), paths) is None
    with pytest.raises(StageError, match=r"no .*labels\.json; set data\.kind: classification"):
        class_names(params("classification"), paths)
    paths.labels.write_text(json.dumps(["a", "b"]))
    assert class_names(params("classification"), paths) == ["a", "b"]


PAIR = {name: [1, 2, 3] for name in ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")}


def test_a_reward_model_learns_from_both_answers_and_margins(tmp_path: Path) -> None:
    run = params("reward", reward={"center_rewards_coefficient": 0.02})
    paths = written(tmp_path, [PAIR | {"weight": 1.0}] * 3)
    assert training_rows(run, paths)["train"].column_names == ["chosen_input_ids", "rejected_input_ids"]
    assert class_names(run, paths) == ["reward"]
    assert (
        merged_rows(run, paths.split("train"), 2)
        == [{"chosen_input_ids": [1, 2, 3], "rejected_input_ids": [1, 2, 3]}] * 2
    )
    trainer, options = trainer_of(run, training_rows(run, paths)["train"], ["reward"])
    assert trainer is RewardTrainer and options == {"objective": BradleyTerry(0.02)}
    assert loss_function(run) == "BradleyTerry(center_rewards_coefficient=0.02)"
    assert start_batch(run, [PAIR], 0)["input_ids"].tolist() == [[1, 2, 3, 0, 0, 0, 0, 0]]
    with_margins = written(tmp_path / "margins", [PAIR | {"weight": 2.0, "margin": 0.5}] * 3)
    row = training_rows(run, with_margins)["train"][0]
    assert (row["margin"], row["weight"]) == (0.5, 2.0)
    assert training_rows(params("dpo"), with_margins)["train"].column_names[:2] == ["chosen_input_ids", "chosen_labels"]
    assert "margin" not in training_rows(params("dpo"), with_margins)["train"].column_names


def test_grpo_trains_on_prompts_with_all_columns_for_the_rewards(tmp_path: Path) -> None:
    row = CHAT | {"prompt_length": 1, "id": "a", "prompt": "Why?", "completion": "So.", "extra": "{}", "weight": 1.0}
    given, paths = params("grpo", grpo={"rewards": ["token_f1"], "max_new_tokens": 7}), written(tmp_path, [row] * 2)
    rows = training_rows(given, paths)
    assert rows["train"][0] == {n: v for n, v in row.items() if n not in ("labels", "weight")} | {"input_ids": [1]}
    assert longest(given, rows) == 1 + 7
    assert start_rows(given, rows["train"], 1) == [{"input_ids": [1], "labels": [1]}]
    assert merged_rows(given, paths.split("train"), 1) == [CHAT]
    trainer, options = trainer_of(given, rows["train"], None)
    assert trainer is GrpoTrainer and options["reward_weights"] == {"token_f1": 1.0}
    assert (options["objective"].beta, options["sampling"].max_new_tokens) == (0.04, 7)
    assert loss_function(given) == loss_function(params("sft")), "their test losses are compared"
    weighted = training_rows(given, written(tmp_path / "other", [row, row | {"weight": 2.0}]))
    assert weighted["train"]["weight"][:] == [1.0, 2.0]
