"""A plan: bytes as arithmetic and real tensors have them, batches as the trainer draws them, and a verdict."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from flows.base.model import load_for_training
from flows.cli import app
from flows.errors import BaseModelError, EstimateError
from flows.params import Params
from flows.paths import Paths
from flows.resources import estimate as estimate_module
from flows.resources import probe as plan_probe
from flows.resources.activations import activations
from flows.resources.batches import BatchSize, RowSize, shapes, workload
from flows.resources.estimate import estimate
from flows.resources.probe import Measured, Task, depths, run_probe, seconds_of, sequence, write_shallow_base
from flows.resources.probe_process import _smoothed, measure
from flows.resources.sizes import sized_adapter, sizes, with_blocks
from flows.stages.detect import without_weights
from peftcore import get_peft_model
from peftcore.train import recompute_activations

GIB = 2**30
LINEARS_7B = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
"""Weights of Llama-7B's linear layers; embedding and output head have 32,000 × 4,096 each."""


def llama_7b() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def params(**sections: dict[str, Any]) -> Params:
    given: dict[str, dict[str, Any]] = {
        "method": {"r": 4},
        "train": {"batch_size": 4, "gradient_accumulation": 2},
        "tracking": {"mode": "disabled"},
    }
    for name, section in sections.items():
        given[name] = given.get(name, {}) | section
    return Params.model_validate(given)


@pytest.fixture
def paths(tmp_path: Path, tiny_base: Path) -> Paths:
    """A pipeline with a tiny base and 22 prepared rows of 8 to 29 tokens, the last third of each supervised."""
    made = Paths(tmp_path)
    made.data.mkdir(parents=True)
    lengths = range(8, 30)
    labels = [[-100] * (n - n // 3) + [5] * (n // 3) for n in lengths]
    table = pyarrow.table({"input_ids": [[5] * n for n in lengths], "labels": labels})
    parquet.write_table(table, made.split("train"))
    parquet.write_table(table.slice(0, 6), made.split("validation"))
    made.params.write_text(json.dumps({"method": {"r": 4}, "tracking": {"mode": "disabled"}}))
    return made


# -- what is kept whatever the batch -----------------------------------------------------------------------------------


def test_a_7b_llama_on_paper() -> None:
    size = sizes(llama_7b(), params(method={"r": 16}), 100)
    assert size.trainable == 39_976_960  # what every LoRA library prints for rank 16 on all linear layers of Llama-7B
    assert (size.adapters, size.gradients, size.optimizer) == (
        4 * size.trainable,
        4 * size.trainable,
        8 * size.trainable,
    )
    bits = 4 + 8 / 64 + 32 / (64 * 256)  # arXiv:2305.14314, section 3: double quantisation
    assert 8 * size.quantized / LINEARS_7B == pytest.approx(bits, rel=1e-3)
    # embedding and head, 65 norms, and in float32 the frequencies of the rotary embedding, once more as they started
    assert size.plain == 2 * (2 * 32000 * 4096 + 65 * 4096) + 2 * 4 * 64
    assert size.dequantized == 2 * 3 * 4096 * 11008 - 2 * 4096 * 11008  # gate and up read one input
    assert size.unquantized == 2 * (LINEARS_7B + 2 * 32000 * 4096 + 65 * 4096)


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [({"double_quant": False}, 4.5), ({"storage": "int8"}, 8 + 32 * (5 * 4096 + 2 * 11008) / (LINEARS_7B / 32)),
     ({"storage": "none"}, 0)],
)  # fmt: skip
def test_bits_of_other_storages(quantization: dict[str, Any], bits: float) -> None:
    size = sizes(with_blocks(llama_7b(), 1), params(quantization=quantization), 100)
    assert 8 * size.quantized / (LINEARS_7B / 32) == pytest.approx(bits, rel=1e-4)


def test_an_8_bit_optimizer_keeps_a_quarter_and_its_scales() -> None:
    config = with_blocks(llama_7b(), 1)
    whole, small = (sizes(config, params(train={"optimizer": name}), 9).optimizer for name in ("adamw", "adamw_8bit"))
    assert small / whole == pytest.approx(1 / 4 + 1 / 256, rel=1e-3)


@pytest.mark.parametrize("quantization", [{}, {"double_quant": False}, {"storage": "int8"}, {"storage": "none"}])
def test_bytes_are_those_of_a_loaded_base(paths: Paths, quantization: dict[str, Any]) -> None:
    chosen = params(quantization=quantization)
    size = sizes(without_weights(paths.base).config, chosen, 10)
    model: Any = load_for_training(paths.base, chosen.quantization, 320)
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code]
            tensors += [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
        elif type(module).__name__ == "Linear8bitLt":
            tensors.append(module.weight.SCB)
    assert size.quantized + size.plain == sum(tensor.nbytes for tensor in tensors)


# -- what a step adds --------------------------------------------------------------------------------------------------


def batch(rows: int, tokens: int, supervised: int = 8) -> BatchSize:
    return BatchSize((RowSize(tokens, supervised),) * rows, True)


@pytest.mark.parametrize("mode", ["none", "selective", "blocks"])
def test_simulated_activations_are_what_a_forward_saves(mode: Any) -> None:
    config = LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=192, num_hidden_layers=6, num_attention_heads=4,
    )  # fmt: skip
    chosen = params(train={"gradient_checkpointing": mode}, quantization={"storage": "none"})
    found = activations(config, chosen, batch(2, 48), 48, 10)
    model: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    model = get_peft_model(model, sized_adapter(chosen, 10)).train()
    recompute_activations(model, mode)
    saved = _saved_bytes(model, lambda: model.base_model(torch.full((2, 48), 5), use_cache=False)[0])
    assert found.kept == pytest.approx(saved, rel=0.06)
    if mode == "blocks":  # one block's activations come back while its input's gradient is computed
        assert found.working > 0.5 * activations(with_blocks(config, 1), params(), batch(2, 48), 48, 10).kept


def _saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
    total = sum(storages.values())
    del kept
    return total


def test_two_depths_tell_of_any_other() -> None:
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4)
    chosen = params(train={"gradient_checkpointing": "selective"})
    two, four, six = (activations(with_blocks(config, n), chosen, batch(2, 32), 32, 10).kept for n in (2, 4, 6))
    assert six - four == four - two > 0


def test_an_evaluation_may_need_more_than_a_step(paths: Paths) -> None:
    packed = params(
        train={"batching": "packed", "pack_tokens": 32, "batch_size": 64, "gradient_checkpointing": "blocks"}
    )
    longest = [[5] * 300] * 64
    parquet.write_table(pyarrow.table({"input_ids": longest, "labels": longest}), paths.split("validation"))
    found = estimate(packed, paths, probe=False)
    scores = 64 * 2 * 304 * 304  # of plain attention: rows, heads, and the row's pairs of tokens
    # in 16 bits and in 32 for the softmax, at one time at least
    assert found.memory["evaluation, beyond training"] > 0.9 * (2 + 4) * scores


# -- batches -----------------------------------------------------------------------------------------------------------


def test_batches_are_the_trainers_own(paths: Paths) -> None:
    grouped = workload(params(), paths)
    assert (grouped.optimizer_steps, grouped.forward_passes) == (3, 6)
    assert sum(len(one.rows) for one in grouped.training) == 22
    assert grouped.largest.shape == (4, 32)  # rows of like length, rounded up to 8
    assert sum(one.tokens for one in grouped.training) < 1.3 * sum(range(8, 30))
    free = workload(params(train={"batching": "padding_free"}), paths)
    assert sum(one.tokens for one in free.training) == sum(range(8, 30))
    packed = workload(params(train={"batching": "packed", "pack_tokens": 64}), paths)
    assert packed.largest.tokens <= 64
    assert {one.shape[0] for one in packed.training} == {1}
    assert [one.shape for one in packed.evaluation] == [(6, 16)]
    assert sum(one.supervised for one in packed.training) == sum(n // 3 for n in range(8, 30))


def test_rows_that_are_not_prepared_are_full(tmp_path: Path) -> None:
    work = workload(params(data={"train_rows": 10}), Paths(tmp_path))
    assert (work.prepared, work.largest.shape, work.optimizer_steps) == (False, (4, 320), 2)
    with pytest.raises(EstimateError, match="train_rows is null"):
        workload(params(data={"train_rows": None}), Paths(tmp_path))


def test_a_pack_that_is_too_short_is_refused(paths: Paths) -> None:
    with pytest.raises(EstimateError, match=r"pack_tokens is 20: .* at least 29"):
        workload(params(train={"batching": "packed", "pack_tokens": 20}), paths)


def test_one_batch_of_each_shape_or_some_from_small_to_large() -> None:
    rows = [RowSize(tokens, 1) for tokens in (9, 30, 12, 64, 3, 21)]
    batches = tuple(BatchSize((row,), True) for row in rows)
    assert [one.shape[1] for one in shapes(batches, 9)] == [32, 16, 64, 8, 24]  # 9 and 12 tokens are both 16 wide
    assert [one.shape[1] for one in shapes(batches, 3)] == [64, 8, 24]


# -- the probe ---------------------------------------------------------------------------------------------------------


def test_two_shallow_models_give_the_deep_one() -> None:
    def found(blocks: int) -> Measured:
        timings = [(100, 1.0 + blocks), (200, 1.0 + 3.0 * blocks)]
        return Measured(500 + 20 * blocks, 400 + 30 * blocks, 3, 0.5 * blocks, timings, timings, 0.1 * blocks, 1)

    for blocks in (5, 12, 30, 80):
        less, more = depths(blocks)
        assert 0 < less < more <= blocks
        whole = found(less).deeper(found(more), (less, more), blocks)
        assert whole.peak == pytest.approx(500 + 20 * blocks)
        assert whole.evaluation_peak == pytest.approx(400 + 30 * blocks)
        assert whole.training[1] == (200, pytest.approx(1 + 3.0 * blocks))
        assert whole.importing == 3
    assert depths(4) == (4,)


def test_batches_between_those_that_were_timed() -> None:
    timings = [(100, 1.0), (200, 3.0)]
    assert seconds_of([batch(1, 104)], timings) == pytest.approx(1.08)
    assert seconds_of([batch(1, 48), batch(1, 200)], timings) == pytest.approx(0.48 + 3.0)


@pytest.mark.parametrize("batching", ["grouped", "packed"])
def test_a_process_of_the_probe_measures_the_train_stages_own_steps(
    paths: Paths, tmp_path: Path, batching: str
) -> None:
    chosen = params(train={"batching": batching, "pack_tokens": 64, "gradient_checkpointing": "selective"})
    work = workload(chosen, paths)
    base = tmp_path / "probe" / "base"
    write_shallow_base(without_weights(paths.base).config, base, 0)
    training, evaluation = sequence(work)
    found = measure(Task(chosen.model_dump(), str(base), training, evaluation, work.longest, 3), imported=1.5)
    assert [size for size, _ in found.training] == sorted({one.tokens for one in training})
    assert [size for size, _ in found.evaluation] == sorted(one.tokens for one in evaluation)
    assert all(seconds > 0 for _, seconds in (*found.training, *found.evaluation))
    assert min(found.loading, found.stepping, found.saving) > 0
    assert found.peak > 100 * 2**20  # a process with PyTorch in it


def test_times_are_smoothed_and_delays_left_out() -> None:
    batches = [batch(4, width) for width in range(8, 328, 8)]
    true = [0.05 + 2e-3 * one.tokens + 1e-6 * one.tokens * one.shape[1] for one in batches]
    rng = random.Random(0)
    noisy = [seconds * rng.uniform(0.97, 1.03) for seconds in true]
    noisy[7] *= 3
    noisy[20] *= 2
    assert [seconds for _, seconds in _smoothed(batches, noisy)] == pytest.approx(true, rel=0.02)
    assert _smoothed(batches[:1], [0.7]) == [(32, pytest.approx(0.7))]


def test_a_task_survives_the_way_into_its_process(tmp_path: Path) -> None:
    task = Task({"train": {}}, "base", [batch(2, 9)], [batch(1, 4)], 9, 5)
    (tmp_path / "task.json").write_text(json.dumps(plan_probe.asdict(task)))
    assert Task.read(tmp_path / "task.json") == task


def test_a_probe_that_fails_or_hangs_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task({}, "base", [], [], 9, 5)
    for script, said in (
        ("echo trouble >&2; echo 'error: no GPU' >&2; exit 1", "failed: no GPU"),
        ("kill -9 $$", "lack of memory; use --no-probe"),
        ("exec sleep 30", "longer than 0.5 seconds; allow more with --probe-timeout"),
    ):
        program = tmp_path / "program"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(plan_probe.sys, "executable", str(program))
        with pytest.raises(EstimateError, match=said):
            run_probe(task, tmp_path, 0.5 if "sleep" in script else 60)


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_without_the_probe_it_adds_up_and_says_so(paths: Paths) -> None:
    found = estimate(params(), paths, probe=False)
    assert found.peak == max(sum(found.memory.values()), found.loading_peak)
    assert (found.time, found.fits) == ({}, True)
    assert "without the probe" in found.notes[-1]
    checkpointing = [change.peak for change in found.changes if "train.gradient_checkpointing" in change.params]
    assert checkpointing == sorted(checkpointing, reverse=True)
    assert found.disk["base"] == 0  # it is there
    assert found.mapped == 2 * 2 * (4 * 32 * 32 - 2 * 32 * 16 + 3 * 32 * 64)  # keys and values have half the heads
    assert replace(found, limit=found.peak - found.mapped).fits  # the system drops a mapped file when it must
    assert not replace(found, limit=found.peak - found.mapped - 1).fits
    assert found.disk["merged model"] == sum(2 * p.numel() for p in without_weights(paths.base).parameters())


def test_with_the_probe_it_has_time_and_what_libraries_take(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    timings = [(64, 0.5), (128, 1.0)]
    monkeypatch.setattr(estimate_module, "changes", lambda *_: [])
    monkeypatch.setattr(estimate_module, "peak_memory", lambda device: GIB // 4)
    monkeypatch.setattr(
        estimate_module, "run_probe", lambda *_: Measured(GIB // 2, GIB, 2.0, 1.0, timings, timings, 0.25, 0.5)
    )
    found = estimate(params(), paths)
    assert found.peak == GIB == sum(found.memory.values())
    assert (found.time["libraries"], found.time["loading the base"]) == (2.0, 1.0)
    assert (found.time["optimiser"], found.time["checkpoints"]) == (3 * 0.25, 3 * 0.5)  # a run of three steps
    passes = [one.tokens / 128 for one in workload(params(), paths).training]
    assert found.time["forward and backward"] == pytest.approx(sum(passes))
    assert found.seconds == pytest.approx(sum(found.time.values()))


def test_a_model_that_is_not_here_and_will_not_fit(
    tmp_path: Path, paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate_module, "memory_limit", lambda device: 3 * GIB)
    monkeypatch.setattr(estimate_module, "peak_memory", lambda device: GIB // 2)
    with_blocks(llama_7b(), 4).save_pretrained(tmp_path / "big")
    monkeypatch.chdir(in_a_project(paths))
    long = {"input_ids": [[5] * 512] * 16, "labels": [[5] * 512] * 16}
    parquet.write_table(pyarrow.table(long), paths.split("train"))
    result = peftcore("plan", "--config", str(tmp_path / "big" / "config.json"), "--no-probe", "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["fits"], found["blocks"]) == (1, False, 4)
    assert result.stderr.startswith("error: training needs ")
    assert "this machine has 3.0 GiB; it fits with " in result.stderr
    assert "train.gradient_checkpointing: blocks" in result.stderr


def test_the_command_prints_tables(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(in_a_project(paths))
    result = peftcore("plan", "--no-probe")
    assert result.exit_code == 0
    for said in ("LlamaForCausalLM, 2 blocks", "base weights, quantised", "merged model", "train.batch_size: 4"):
        assert said in result.stdout


def in_a_project(paths: Paths) -> Path:
    (paths.root / "dvc.yaml").write_text("stages: {}\n")
    (paths.root / ".dvc").mkdir()
    return paths.root


def peftcore(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments))


def test_a_full_disk_is_foreseen(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_module, "changes", lambda *_: [])
    monkeypatch.setattr(estimate_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1024}))
    found = estimate(params(), paths, probe=False)
    assert not found.fits
    assert "of disk, and 0 MiB are free" in found.refusal()


def test_what_cannot_be_planned_is_refused(paths: Paths) -> None:
    with pytest.raises(EstimateError, match="objective is dpo; only sft"):
        estimate(params(data={"kind": "preference", "source": "rows.jsonl"}, train={"objective": "dpo"}), paths)
    with pytest.raises(EstimateError, match=r"method: .*no_such"):
        estimate(params(method={"target_modules": ["no_such"]}), paths, probe=False)
    with pytest.raises(BaseModelError, match="run the fetch stage, or give --config"):
        estimate(params(), Paths(paths.root / "elsewhere"), probe=False)
