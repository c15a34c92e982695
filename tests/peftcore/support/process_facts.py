"""What a process of a group observes in training: which rows it sees, what it sends, how it resumes, what it shards."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, PartialState
from process_cases import EQUAL, batching, numbered_rows, outcome
from process_groups import fresh_state, group
from quiet_training import trained
from safetensors.torch import load_file
from tiny_training import adapted, trainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from peftcore import LoraConfig

COUNTS = (3, 17, 18)
"""Rows of a set, in batches of two: one more than a round, one more than whole batches, an odd number of batches."""
RESUMED = {"lora": (7,), "adalora": (3, 7)}
"""Methods, and the steps after which a run goes on: in the second epoch, before AdaLoRA prunes and after."""
SHARDED: dict[str, Any] = {"fsdp": True, "max_steps": 4, "gradient_accumulation_steps": 2}


# -- data parallel -----------------------------------------------------------------------------------------------------


def data_parallel(folder: Path) -> dict[str, Any]:
    """Everything that one group of processes can observe."""
    own = folder / f"rank {dist.get_rank()}"  # but for checkpoints, which all write together
    found: dict[str, Any] = {}
    for name, case in EQUAL.items():
        with fresh_state():
            found[name] = case(own / name, 2)
    for fact in (rows_seen, rows_evaluated, bytes_sent, idle_adapters, adapter_of_one_process, resumed):
        with fresh_state():
            found[fact.__name__] = fact(folder if fact is resumed else own)
    return found


def rows_seen(folder: Path) -> dict[tuple[str, int], list[list[int]]]:
    """{(kind of batches, rows): the numbers of the rows with labels, in each of two epochs}"""
    found = {}
    for kind in ("grouped", "random", "padding_free", "packed"):
        for count in COUNTS:
            made = trainer(adapted(), folder, **batching(kind, count))
            loader = made.get_train_dataloader()
            epochs = []
            for epoch in (0, 1):
                loader.set_epoch(epoch)
                batches, items = made.get_batch_samples(iter(loader), len(loader), torch.device("cpu"))
                assert items is not None and len(batches) == len(loader)
                epochs.append([number for batch in batches for number in numbers(batch)])
            found[kind, count] = epochs
    return found


def numbers(batch: dict[str, Tensor]) -> list[int]:
    """The first tokens of a batch's rows or documents; none of what has no labels."""
    if not (batch["labels"] != -100).any():
        return []
    if "position_ids" in batch:
        return batch["input_ids"][batch["position_ids"] == 0].tolist()
    return batch["input_ids"][:, 0].tolist()


def rows_evaluated(folder: Path) -> dict[int, tuple[list[int], int]]:
    """{rows: (numbers of the rows whose losses were counted, supervised tokens)}"""
    found = {}
    for count in (1, *COUNTS):
        made = trainer(adapted(), folder, per_device_eval_batch_size=2)
        data = numbered_rows(count)
        loader = made.get_eval_dataloader(data)
        seen = [made.accelerator.gather_for_metrics(batch["input_ids"][:, 0]) for batch in loader]
        found[count] = (torch.cat(seen).tolist(), made.evaluate(data)["eval_tokens"])
    return found


class _CountSteps(TrainerCallback):
    def __init__(self) -> None:
        self.sent: list[list[tuple[str, int]]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sent.append(list(group().sent))
        group().sent.clear()


class _Hidden(nn.Module):
    """A model behind another, where DDP does not see what it need not send."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def bytes_sent(folder: Path) -> dict[str, Any]:
    """By collective: before the first step, in each step, and by DDP where it does not know what is frozen."""
    model, counts = adapted(), _CountSteps()
    group().sent.clear()
    trainer(model, folder, max_steps=4, callbacks=[counts]).train()
    start, *steps = [_summed(sent) for sent in counts.sent]
    group().sent.clear()
    DistributedDataParallel(_Hidden(adapted()))
    adapter = [p for p in model.parameters() if p.requires_grad]
    return {
        "start": start,
        "steps": steps,
        "unknowing": _summed(group().sent),
        "adapter": sum(p.numel() * p.element_size() for p in adapter),
        "parameters": len(adapter),
        "model": sum(p.numel() * p.element_size() for p in model.parameters()),
    }


def _summed(sent: list[tuple[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for collective, size in sent:
        total[collective] += size
    return dict(total)


def idle_adapters(folder: Path) -> dict[str, Tensor]:
    """What is trained where a second adapter could be but does not act, with and without checkpointed activations."""
    found = {}
    for recomputes in (False, True):
        model = adapted()
        model.add_adapter("idle", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model.set_requires_grad("idle")
        trainer(model, folder, max_steps=3, activation_checkpointing=recomputes).train()
        found |= {f"{recomputes} {name}": tensor for name, tensor in trained(model).items()}
    return found


def adapter_of_one_process(folder: Path) -> dict[str, Any]:
    """What is trained where a second adapter acts in the last process alone, and how it began."""
    model = adapted()
    model.add_adapter("routed", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.set_requires_grad("routed")
    if dist.get_rank():
        model.set_adapter(["default", "routed"])
    made = trainer(model, folder, max_steps=3)
    starts: list[dict[str, Tensor]] = []

    class _Begin(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            starts.append(trained(model))  # DDP has given all processes the first one's

    made.add_callback(_Begin())
    made.train()
    return {"before": starts[0], "after": trained(model)}


class _OwnNumbers(TrainerCallback):
    """Gives each process random numbers of its own."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.manual_seed(dist.get_rank())


def resumed(folder: Path) -> dict[str, Any]:
    """{method: {the step whose checkpoint a run went on from, None for the uninterrupted run: what came of it}}"""
    found: dict[str, Any] = {}
    for method, steps in RESUMED.items():
        found[method] = {}
        for step in (None, *steps):
            model = adapted(method, dropout=0.2)
            saving = {"save_strategy": "steps", "save_steps": 1} if step is None else {}
            options = {**saving, **batching("grouped", 17), "callbacks": [_OwnNumbers()]}
            made = trainer(model, folder / method, **options)
            made.train(resume_from_checkpoint=None if step is None else str(folder / method / f"checkpoint-{step}"))
            found[method][step] = outcome(made, model)
            dist.barrier()
    return found


# -- sharded -----------------------------------------------------------------------------------------------------------


@contextmanager
def _taken_for_gpus() -> Iterator[None]:
    """accelerate shards on GPUs and their like alone, so it is told that these processes have one; all else is its."""
    made = AcceleratorState.__init__

    def on_gpus(state: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        if not AcceleratorState._shared_state:  # it is made again wherever it is asked for
            PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
        made(state, *args, **kwargs)

    with patch.object(AcceleratorState, "__init__", on_gpus):
        yield


def sharded(folder: Path) -> dict[str, Any]:
    """A run whose parameters each process holds a part of: how it went, what it saved, and one that went on from it."""
    found: dict[str, Any] = {}
    options = {**SHARDED, **batching("grouped", 17), "save_strategy": "steps", "save_steps": 2}
    for name in ("straight", "resumed"):
        model = adapted(dtype=torch.float64).double()
        with fresh_state(), _taken_for_gpus():
            made = trainer(model, folder / name, **options, callbacks=[_OwnNumbers()])
            checkpoint = str(folder / "straight" / "checkpoint-2")
            made.train(resume_from_checkpoint=checkpoint if name == "resumed" else None)
            losses = [record["loss"] for record in made.state.log_history if "loss" in record]
            parts = {n: p.to_local().numel() / p.numel() for n, p in model.model.layers.named_parameters()}
            model.save_pretrained(folder / f"{name} saved")
            dist.barrier()
            evaluation = made.evaluate()
            found[name] = {
                "losses": losses,
                "parts": parts,
                "evaluation": (evaluation["eval_loss"], evaluation["eval_tokens"]),
                "adapter": load_file(folder / f"{name} saved" / "adapter_model.safetensors"),
            }
    found["checkpoint"] = sorted(path.name for path in (folder / "straight" / "checkpoint-4").iterdir())
    return found
