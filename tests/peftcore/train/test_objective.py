"""The trainer's loss under what wraps around a model: accumulation, data parallelism, shards, a compiler."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from datasets import Dataset
from quiet_training import VOCABULARY, quiet_arguments, tiny_llama
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from peftcore import LoraConfig, get_peft_model
from peftcore.train import (
    AdapterTrainer,
    AdapterTrainerMixin,
    RightPaddingCollator,
    head_hooks,
    objective,
    token_losses,
)


def adapted(**options: Any) -> Any:
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options)
    return get_peft_model(tiny_llama(), lora)


def rows(count: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in torch.randint(6, 14, (count,), generator=generator).tolist():
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    return made


def batch(count: int = 4) -> dict[str, Tensor]:
    return RightPaddingCollator(0)(rows(count))


def trainer(model: nn.Module, folder: Any, **options: Any) -> AdapterTrainer:
    return AdapterTrainer(
        model=model,
        args=quiet_arguments(folder, **options),
        train_dataset=Dataset.from_list(rows(8)),
        eval_dataset=Dataset.from_list(rows(8)),
        data_collator=RightPaddingCollator(0),
    )


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts of the rows whose losses were computed without logits."""
    seen: list[int] = []
    real = head_hooks.linear_cross_entropy
    monkeypatch.setattr(
        head_hooks, "linear_cross_entropy", lambda hidden, *rest: seen.append(len(hidden)) or real(hidden, *rest)
    )
    yield seen


def test_a_loss_is_over_the_tokens_of_the_whole_accumulated_batch(tmp_path: Any, computed: list[int]) -> None:
    model = adapted().double()
    made = trainer(model, tmp_path)
    inputs = batch()
    items = torch.tensor(100)
    tokens = int((inputs["labels"][:, 1:] != -100).sum())
    own = model(**inputs).loss
    found = made.compute_loss(model, dict(inputs), num_items_in_batch=items)
    assert found.item() == pytest.approx(own.item() * tokens / 100, rel=1e-6)
    assert made.compute_loss(model, dict(inputs)).item() == pytest.approx(own.item(), rel=1e-6)
    assert computed == [tokens] * 2


def test_a_loss_of_the_users_own_is_left_to_him(tmp_path: Any, computed: list[int]) -> None:
    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **named: Any) -> Any:
            outputs = model(**inputs)
            return (outputs.loss * 3, outputs) if return_outputs else outputs.loss * 3

    class Both(AdapterTrainerMixin, Own):
        pass

    plain = trainer(adapted(), tmp_path)
    made = Both(**{name: getattr(plain, name) for name in ("model", "args", "eval_dataset", "data_collator")})
    inputs = batch()
    assert made.compute_loss(made.model, dict(inputs)).item() == pytest.approx(3 * made.model(**inputs).loss.item())
    assert made.evaluate()["eval_loss"] == pytest.approx(3 * plain.evaluate()["eval_loss"], rel=0.1)  # of batches
    assert len(computed) == 1  # the plain trainer's evaluation alone


def test_evaluation_computes_no_logits(tmp_path: Any, computed: list[int]) -> None:
    made = trainer(adapted(), tmp_path, per_device_eval_batch_size=3)
    metrics = made.evaluate()
    assert sum(computed) == metrics["eval_tokens"] and len(computed) == 3


def test_a_compiled_model_keeps_transformers_loss(
    tmp_path: Any, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted()
    made = trainer(model, tmp_path)
    expected = made.compute_loss(model, batch()).item()
    monkeypatch.setattr(objective, "token_losses", None)  # would be an error to call
    computed.clear()
    compiled = torch.compile(model, backend="eager")
    assert made.compute_loss(compiled, batch()).item() == pytest.approx(expected, rel=1e-6)
    assert not computed


# -- processes -------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(model: nn.Module, losses: Tensor) -> dict[str, Tensor]:
    losses.mean().backward()
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad: Any = parameter.grad
            found[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def assert_alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and one
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("find_unused", [False, True])
def test_data_parallel_gradients_are_those_of_one_process(find_unused: bool, computed: list[int]) -> None:
    inputs = batch()
    labels = inputs.pop("labels")
    plain = adapted().double()
    expected = gradients(plain, token_losses(plain, inputs, labels)[0])
    model = adapted().double()
    wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused)
    for _ in range(2):
        model.zero_grad()
        assert_alike(gradients(wrapped, token_losses(wrapped, inputs, labels)[0]), expected)
    assert len(computed) == 3


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("keeps_root", [False, True])
@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_a_sharded_model_computes_every_logit_and_has_the_gradients_of_one_process(
    keeps_root: bool, saved: list[str] | None, computed: list[int]
) -> None:
    inputs = batch()
    labels = inputs.pop("labels")
    plain = adapted(modules_to_save=saved).double()
    expected = gradients(plain, token_losses(plain, inputs, labels)[0])
    model = adapted(modules_to_save=saved).double()
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=not keeps_root)
    for _ in range(2):
        model.zero_grad()
        assert_alike(gradients(model, token_losses(model, inputs, labels)[0]), expected)
    assert len(computed) == 1  # of the plain model alone
