"""The rounds of `benchmarks.lifecycle`: the two models, and one operation after the other on both."""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peftcore
from benchmarks.machine import machine
from peftcore.storage.checkpoint import adapter_tensors

RANK = 8
MANY = 20
"""Adapters loaded, at most, when everything but loading and disabling is measured; PEFT takes seconds for each."""
LOAD = "load one more adapter"
DISABLE = "disable_adapter, in and out"

Call = Callable[[Any], Any]


@dataclass
class Models:
    """What one round runs on."""

    ours: Any
    peft: Any
    few: Any = None
    """Ours with two adapters at most, timed in the same round: a load on the machine that comes and goes cancels."""


class Times:
    """ms of each round by operation and adapters loaded (0 where their number says nothing)."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int], dict[str, list[float]]] = {}

    def record(self, operation: str, count: int, models: Models, ours: Call, theirs: Call) -> None:
        """One round of an operation; ours and few take turns to come first, which finds the processor's caches cold."""
        row = self.rows.setdefault((operation, count), {"ours": [], "few": [], "peft": []})
        sides = [("ours", models.ours), ("few", models.few)]
        for name, model in sides if len(row["ours"]) % 2 else sides[::-1]:
            if model is not None:
                row[name].append(timed(ours, model))
        row["peft"].append(timed(theirs, models.peft))


# -- models ------------------------------------------------------------------------------------------------------


def thin_llama(blocks: int) -> Any:
    """Many layers and little arithmetic, so that what Python does shows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def smollm(folder: Path | None) -> Any:
    """SmolLM2-135M from its folder, or its shape, in bf16."""
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True).eval()
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(torch.bfloat16).eval()


def adapted(base: nn.Module, scratch: Path, rank: int) -> Models:
    """The models with one and the same adapter, which lies in `scratch` then."""
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:  # at zero, as it starts, a merge would change nothing
            nn.init.normal_(parameter, std=0.01)
    theirs.save_pretrained(str(scratch))
    ours, few = (peftcore.PeftModel.from_pretrained(copy.deepcopy(base), scratch) for _ in range(2))
    return Models(ours, theirs.eval(), few)


def check_equal(ours: Any, theirs: Any) -> None:
    """Stop unless both merge to the same weights within the base type's rounding; what is wrong may well be fast."""
    ours.merge_adapter()
    theirs.merge_adapter()
    its = {name.replace(".base_layer.", "."): weight for name, weight in theirs.base_model.model.named_parameters()}
    for name, weight in ours.named_parameters():
        if name.endswith(".base_layer.weight"):
            other = its[name.replace(".base_layer.", ".")]
            if not torch.allclose(weight, other, rtol=4 * torch.finfo(weight.dtype).eps, atol=1e-5):
                raise SystemExit(f"error: ours and PEFT merge {name} to other weights")
    ours.unmerge_adapter()
    theirs.unmerge_adapter()


# -- measuring ---------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every figure of the table and of the picture."""
    torch.set_num_threads(1)
    times, thin = Times(), thin_llama(options.blocks)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        measure_injection(times, thin, options.repeats)
        every = measure_loaded(times, adapted(thin, folder / "thin", RANK), folder, options)
        real = adapted(smollm(options.base), folder / "real", 2 * RANK)
        check_equal(real.ours, real.peft)
        measure_merge(times, "SmolLM2-135M bf16: ", 0, Models(real.ours, real.peft), options.repeats)
    rows = [{"operation": name, "loaded": count, **row} for (name, count), row in times.rows.items()]
    return {
        "machine": f"{machine()}, peft {peft.__version__}",
        "layers": 7 * options.blocks,
        "rows": rows,
        "ours_at_every_count": every,
    }


def measure_injection(times: Times, base: nn.Module, repeats: int) -> None:
    given: dict[str, Any] = {"r": RANK, "target_modules": "all-linear"}
    for round_number in tqdm(range(-1, repeats), desc="injection"):
        (times if round_number >= 0 else Times()).record(
            "add the first adapter",
            0,
            Models(copy.deepcopy(base), copy.deepcopy(base)),
            lambda model: peftcore.get_peft_model(model, peftcore.LoraConfig(**given)),
            lambda model: peft.get_peft_model(model, peft.LoraConfig(**given)),
        )


def measure_loaded(times: Times, models: Models, folder: Path, options: argparse.Namespace) -> list[tuple[int, float]]:
    """Everything at each count of adapters; gives (count, ms) of each load of ours on the way there."""
    check_equal(models.ours, models.peft)
    saved = str(folder / "thin")
    every, loaded, many = [], 1, max(count for count in options.points if count <= MANY)
    for count in tqdm(options.points, desc="adapters loaded"):
        for number in range(loaded + 1, count):
            every.append((number, timed(lambda model, n=number: model.load_adapter(saved, f"a{n}"), models.ours)))
            copy_adapter(models.peft, f"a{number}")
        loaded = count - 1
        for round_number in range(options.repeats + 1):
            times.record(LOAD, count, models, load_last(saved), load_last(saved))
            if round_number < options.repeats:
                times.record("delete one", count, models, delete_last, delete_last)
        for _ in range(options.repeats):
            times.record(DISABLE, count, models, disable, disable)
        if count in (2, many):
            measure_use(times, count, models, folder, options.repeats)
        for model in (models.ours, models.peft, models.few):
            delete_last(model)
    return every


def load_last(saved: str) -> Call:
    return lambda model: model.load_adapter(saved, "last")


def delete_last(model: Any) -> None:
    model.delete_adapter("last")


def disable(model: Any) -> None:
    with model.disable_adapter():
        pass


def copy_adapter(theirs: Any, name: str) -> None:
    """One more adapter in PEFT's model, layer by layer, for its own way takes seconds each."""
    config = theirs.peft_config["default"]
    for layer in theirs.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.update_layer(name, r=config.r, lora_alpha=config.lora_alpha, config=config)
    theirs.peft_config[name] = copy.copy(config)


def measure_use(times: Times, count: int, models: Models, folder: Path, repeats: int) -> None:
    """What is done with adapters that are there, "default" acting and "last" idle."""

    def activate(name: str) -> Call:
        return lambda model: model.set_adapter(name)

    def save(model: Any) -> None:
        model.save_pretrained(str(folder / "again"), selected_adapters=["default"])

    for _ in range(repeats):
        times.record("set_adapter", count, models, activate("last"), activate("last"))
        Times().record("back", count, models, activate("default"), activate("default"))
        times.record(
            "state dict of one",
            count,
            models,
            lambda model: adapter_tensors(model, "default"),
            lambda model: peft.get_peft_model_state_dict(model, adapter_name="default"),
        )
        times.record("save one", count, models, save, save)
    measure_merge(times, "", count, models, repeats)


def measure_merge(times: Times, which: str, count: int, models: Models, repeats: int) -> None:
    def merge(model: Any) -> None:
        model.merge_adapter()

    def unmerge(model: Any) -> None:
        model.unmerge_adapter()

    names = [f"{which}merge_adapter", f"{which}unmerge_adapter"]
    for round_number in range(-1, repeats):
        into = times if round_number >= 0 else Times()
        for name, call in zip(names, (merge, unmerge), strict=True):
            into.record(name, count, models, call, call)
    merged, unmerged = (times.rows[name, count] for name in names)
    times.rows[f"{which}merge and unmerge", count] = {
        side: [a + b for a, b in zip(merged[side], unmerged[side], strict=True)] for side in merged
    }


def timed(call: Call, model: Any) -> float:
    """Wall time in ms; what the call gives is kept until it is over, so that freeing it is not counted."""
    start = time.perf_counter()
    kept = call(model)
    end = time.perf_counter()
    del kept
    return 1e3 * (end - start)
