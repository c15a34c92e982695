import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from killed_runs import Nursery
from quiet_training import trained
from tiny_training import adapted, records, rows, trainer
from torch import Tensor, nn

from peftcore import TrainingError
from peftcore.train import FaultPolicy, PackedCollator, Packs
from peftcore.train.out_of_memory import fresh_gradients, is_out_of_memory, row_count, split_rows

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")


class _Room(nn.Module):
    """A layer that fits `rows` rows: with more, it fails as an allocator does, forward or `backward`."""

    def __init__(self, layer: nn.Module, rows: int, backward: bool) -> None:
        super().__init__()
        self.layer, self.rows, self.backward = layer, rows, backward
        self.seen: list[int] = []

    def forward(self, hidden: Tensor, *given: Any, **named: Any) -> Any:
        self.seen.append(len(hidden))
        if len(hidden) > self.rows and not self.backward:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        output = self.layer(hidden, *given, **named)
        if len(hidden) > self.rows:
            output.register_hook(self._fail)
        return output

    @staticmethod
    def _fail(grad: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def with_room_for(model: Any, count: int, backward: bool = False) -> _Room:
    """Make the first layer fit `count` rows; in the backward pass, the second layer's gradients are there by then."""
    room = _Room(model.model.layers[0], count, backward)
    model.model.layers[0] = room
    return room


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name.replace(".layers.0.layer.", ".layers.0."): tensor for name, tensor in trained(model).items()}


@pytest.mark.parametrize(("method", "backward"), [("lora", False), ("adalora", True)])
def test_a_batch_that_does_not_fit_trains_in_parts_as_if_it_did(
    tmp_path: Path, method: str, backward: bool, caplog: pytest.LogCaptureFixture
) -> None:
    # AdaLoRA's regulariser counts once a step; gradients of an earlier micro-batch are there when the second fails
    options: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}
    whole, parts = adapted(method).double(), adapted(method).double()
    straight = trainer(whole, tmp_path / "a", **options)
    straight.train()
    room = with_room_for(parts, 2, backward)
    split = trainer(parts, tmp_path / "b", **options)
    with caplog.at_level(logging.WARNING):
        split.train()
    # one row is compared with the model's own loss, and 3 rows show how logits are processed, which need no backward
    # pass; 3 rows do not fit either, and half of them is 1
    assert list(dict.fromkeys(room.seen)) == ([1, 3, 6] if backward else [1, 3]) and room.seen[-1] == 1
    for name, tensor in weights_of(whole).items():
        torch.testing.assert_close(tensor, weights_of(parts)[name], rtol=1e-7, atol=1e-10)
    for one, other in zip(records(straight), records(split), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert one.get("regularizer") == other.get("regularizer")
    assert [record.get("micro_batch_splits", 0) for record in records(split)] == [2, 0, 0]
    assert "out of memory with 6 rows: from now on a forward pass has 3 rows" in caplog.text
    assert "divide per_device_train_batch_size by 6 and multiply gradient_accumulation_steps by 6" in caplog.text


def test_a_single_row_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    model = adapted()
    with_room_for(model, 0)
    before = trained(model)
    with pytest.raises(TrainingError, match=r"out of memory with a single row: shorten the rows .*2\.00 GiB"):
        trainer(model, tmp_path).train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained(model).items())


def test_a_pack_that_does_not_fit_is_an_error_that_names_packs(tmp_path: Path) -> None:
    made = trainer(
        adapted(), tmp_path, Packs(rows(16), 64), data_collator=PackedCollator(), per_device_train_batch_size=1
    )
    with_room_for(made.model, 0)
    with pytest.raises(TrainingError, match="shorten the rows \\(or the packs\\)"):
        made.train()


def test_the_policy_to_stop_says_what_to_lower(tmp_path: Path) -> None:
    model = adapted()
    room = with_room_for(model, 2)
    with pytest.raises(
        TrainingError, match=r"lower per_device_train_batch_size, and raise gradient_accumulation_steps"
    ):
        trainer(model, tmp_path, faults=FaultPolicy(on_out_of_memory="stop")).train()
    assert room.seen == [1, 3]  # one row is compared with the model's own loss, and 3 show how logits are processed


def test_a_loss_that_is_a_mean_is_not_split(tmp_path: Path) -> None:
    model = adapted()
    with_room_for(model, 2)
    with pytest.raises(TrainingError, match=r"cannot be split .*its loss is a mean"):
        trainer(model, tmp_path, label_smoothing_factor=0.1).train()


def test_a_resumed_run_computes_as_many_rows_at_once(tmp_path: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    first = adapted(dropout=0.3)
    with_room_for(first, 2)
    straight = trainer(first, tmp_path, **saving)
    straight.train()
    again = adapted(dropout=0.3)
    room = with_room_for(again, 2)
    resumed = trainer(again, tmp_path, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert set(room.seen) == {1, 2}
    assert [r["loss"] for r in records(resumed)] == [r["loss"] for r in records(straight)]


def test_other_errors_pass(tmp_path: Path) -> None:
    model = adapted()
    data = Dataset.from_dict({"input_ids": [[1, 2, 500]] * 4, "labels": [[1, 2, 3]] * 4})  # no such token
    with pytest.raises(IndexError, match="out of range"):
        trainer(model, tmp_path, data).train()
    assert not is_out_of_memory(RuntimeError("size mismatch")) and not is_out_of_memory(KeyError("x"))
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried"))


def test_parts_hold_each_row_once_and_the_rest_whole() -> None:
    batch = {"labels": torch.arange(10).view(5, 2), "weight": torch.arange(5), "scale": torch.tensor(2.0), "use": True}
    parts = split_rows(batch, 2)
    assert [len(part["labels"]) for part in parts] == [2, 2, 1]
    assert all(part["scale"] == 2 and part["use"] for part in parts)
    for name in ("labels", "weight"):
        assert torch.equal(torch.cat([part[name] for part in parts]), batch[name])
    assert row_count(batch) == 5 and row_count({"a": torch.ones(3, 5), "b": torch.ones(5)}) is None


def test_gradients_of_a_failure_are_dropped_and_others_added_bit_for_bit() -> None:
    torch.manual_seed(0)
    used, idle = nn.Parameter(torch.randn(50)), nn.Parameter(torch.randn(3))
    factors = torch.randn(2, 50)
    (used * factors[0]).sum().backward()
    first = used.grad
    with pytest.raises(RuntimeError, match="half way"), fresh_gradients([used, idle]):
        (used * factors[1]).sum().backward()
        idle.sum().backward()
        raise RuntimeError("half way")
    assert used.grad is first and torch.equal(first, factors[0]) and idle.grad is None
    with fresh_gradients([used, idle]):
        (used * factors[1]).sum().backward()
        idle.sum().backward()
    assert torch.equal(used.grad, factors[0] + factors[1]) and idle.grad.tolist() == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits the address space as Linux does")
def test_a_real_allocators_failure_is_split(nursery: Nursery, tmp_path: Path) -> None:
    assert nursery.run(tmp_path, "limited memory") == 0, (tmp_path / "error.txt").read_text()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["rows"] < 8 and any("can't allocate memory" in line for line in found["warned"])
    assert found["worst"] < 1e-10
