"""Training on two processes (gloo, CPU) equals training on one, sees each row once, and sends the adapter alone."""

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from process_cases import EQUAL, batching, numbered_rows
from process_facts import COUNTS, RESUMED, SHARDED, data_parallel, sharded
from process_groups import PROCESSES, fresh_state, together
from safetensors.torch import load_file
from tiny_training import adapted, trainer

from peftcore import LoraConfig, PeftConfig, TrainingError, VeraConfig, get_peft_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        # the deprecation is inside transformers' own scheduler set-up
        "ignore:Detected call of `lr_scheduler.step:UserWarning"
    ),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process of a data-parallel group observed."""
    return together(data_parallel, tmp_path_factory.mktemp("group"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def found_sharded(folder: Path) -> list[dict[str, Any]]:
    """What each process of a group that shards the model observed."""
    return together(sharded, folder, backend="gloo")


def assert_close(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance, msg=name)


# -- equal to one process ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_equal_one_that_accumulates_twice_as_much(
    name: str, found: list[dict[str, Any]], tmp_path: Path
) -> None:
    with fresh_state():
        alone = EQUAL[name](tmp_path, 2 * PROCESSES)
    for process in found:
        assert process[name]["losses"] == pytest.approx(alone["losses"], abs=1e-6)  # logged in float32
        assert_close(process[name]["adapter"], alone["adapter"], 1e-10)
        if alone["evaluation"] is not None:
            assert process[name]["evaluation"] == pytest.approx(alone["evaluation"], rel=1e-10)
        assert process[name]["kept"] == alone["kept"]
    assert bool(alone["kept"]) == (name == "adalora")


@pytest.mark.parametrize(("method", "step"), [(method, step) for method, steps in RESUMED.items() for step in steps])
def test_a_resumed_run_equals_an_uninterrupted_one_in_every_process(
    method: str, step: int, found: list[dict[str, Any]]
) -> None:
    outcomes = [process["resumed"][method] for process in found]
    for outcome in outcomes:
        assert outcome[step]["losses"] == outcome[None]["losses"]
        assert_close(outcome[step]["adapter"], outcome[None]["adapter"], 0)
    assert_close(outcomes[0][step]["adapter"], outcomes[1][step]["adapter"], 0)


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["grouped", "random", "padding_free", "packed"])
@pytest.mark.parametrize("count", COUNTS)
def test_each_row_is_seen_by_one_process_once_an_epoch(kind: str, count: int, found: list[dict[str, Any]]) -> None:
    for epoch in (0, 1):
        seen = [process["rows_seen"][kind, count][epoch] for process in found]
        assert sorted(chain.from_iterable(seen)) == list(range(1, count + 1))


def test_another_epoch_has_another_order(found: list[dict[str, Any]]) -> None:
    for kind in ("grouped", "random", "padding_free", "packed"):
        first, second = found[0]["rows_seen"][kind, 17]
        assert first != second


@pytest.mark.parametrize("count", [1, *COUNTS])
def test_evaluation_counts_each_row_once(count: int, found: list[dict[str, Any]]) -> None:
    tokens = sum(label != -100 for row in numbered_rows(count)["labels"] for label in row[1:])
    for process in found:
        seen, counted = process["rows_evaluated"][count]
        assert sorted(seen) == list(range(1, count + 1))
        assert counted == tokens


# -- communication -----------------------------------------------------------------------------------------------------


def test_only_the_adapter_is_sent(found: list[dict[str, Any]]) -> None:
    for process in found:
        sent = process["bytes_sent"]
        frozen = sent["model"] - sent["adapter"]
        small = 16 * sent["parameters"] + 1024  # shapes, which parameters were used, losses, counts
        assert sent["adapter"] <= sum(sent["start"].values()) <= sent["adapter"] + small < frozen
        for step in sent["steps"]:
            assert set(step) <= {"allreduce", "allgather"}
            assert sent["adapter"] <= sum(step.values()) <= sent["adapter"] + small
        # the count sees it where the frozen base is sent
        assert sent["unknowing"]["broadcast"] >= sent["model"]


def own_name(name: str) -> str:
    """Return a tensor's name without the path of its layer and the name of its adapter."""
    return name.removesuffix(".default").rpartition(".")[2]


ON_Q: dict[str, Any] = {"r": 4, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("config", "frozen"),
    [
        (LoraConfig(**ON_Q), set()),
        (VeraConfig(**ON_Q), {"vera_A", "vera_B"}),  # drawn, and shared by all layers
        (LoraConfig(**ON_Q, init_lora_weights="loftq", loftq_config={"loftq_bits": 4}), {"weight"}),  # of a moved base
    ],
    ids=["lora", "vera", "loftq"],
)
def test_of_what_is_frozen_only_what_the_adapter_brought_or_changed_is_sent(
    config: PeftConfig, frozen: set[str]
) -> None:
    model = get_peft_model(adapted().unload(), config)
    named = dict((*model.named_parameters(), *model.named_buffers()))
    sent = named.keys() - set(model._ddp_params_and_buffers_to_ignore)
    assert {name for name, tensor in named.items() if tensor.requires_grad} <= sent
    assert {own_name(name) for name in sent if not named[name].requires_grad} == frozen
    assert all("q_proj" in name for name in sent)


def test_an_adapter_that_does_not_act_stays_and_holds_nobody_up(found: list[dict[str, Any]]) -> None:
    assert_close(found[0]["idle_adapters"], found[1]["idle_adapters"], 0)
    trained = {name: t for name, t in found[0]["idle_adapters"].items() if ".default." in name}
    plain = {name.removeprefix("True "): t for name, t in trained.items() if name.startswith("True ")}
    assert_close(plain, {n.removeprefix("False "): t for n, t in trained.items() if n.startswith("False ")}, 1e-6)


def test_an_adapter_that_acts_in_one_process_alone_is_the_same_in_all(found: list[dict[str, Any]]) -> None:
    before, after = (found[1]["adapter_of_one_process"][when] for when in ("before", "after"))
    assert_close(found[0]["adapter_of_one_process"]["after"], after, 0)
    routed = [name for name in after if ".routed." in name]
    assert routed and all(not torch.equal(before[name], after[name]) for name in routed)


# -- sharded -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own call
def test_sharded_training_equals_one_process_and_is_saved_whole(
    found_sharded: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    model = adapted(dtype=torch.float64).double()
    options = {**SHARDED, "fsdp": None, "gradient_accumulation_steps": 2 * PROCESSES}
    with fresh_state():
        made = trainer(model, tmp_path, **options, **batching("grouped", 17))
        made.train()
        evaluation = made.evaluate()
    model.save_pretrained(tmp_path / "saved")
    expected = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    losses = [record["loss"] for record in made.state.log_history if "loss" in record]
    for process in found_sharded:
        straight = process["straight"]
        assert straight["losses"] == pytest.approx(losses, abs=1e-6)
        assert straight["evaluation"] == pytest.approx((evaluation["eval_loss"], evaluation["eval_tokens"]), rel=1e-10)
        assert_close(straight["adapter"], expected, 1e-10)
        assert set(straight["parts"].values()) == {1 / PROCESSES}
    theirs = PeftModel.from_pretrained(adapted(dtype=torch.float64).unload(), str(folder / "straight saved"))
    tokens = torch.arange(1, 9)[None]
    torch.testing.assert_close(theirs.double()(tokens).logits, model(tokens).logits, rtol=0, atol=1e-6)


def test_a_sharded_run_resumes_from_a_checkpoint_without_the_base(found_sharded: list[dict[str, Any]]) -> None:
    for process in found_sharded:
        assert process["resumed"]["losses"] == process["straight"]["losses"]
        assert_close(process["resumed"]["adapter"], process["straight"]["adapter"], 0)
        files = process["checkpoint"]
        assert "adapter_model.safetensors" in files and not any(name.startswith("pytorch_model") for name in files)
        assert {f"rng_state_{rank}.pth" for rank in range(PROCESSES)} <= set(files)


def test_a_method_that_needs_whole_parameters_is_not_sharded(tmp_path: Path) -> None:
    made = trainer(adapted("adalora"), tmp_path)
    made.is_fsdp_enabled = True
    with pytest.raises(TrainingError, match=r"ADALORA changes whole parameters .* train it data parallel"):
        made.processes.check_shardable(made.model)
