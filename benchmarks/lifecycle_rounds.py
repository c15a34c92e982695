"""The rounds of `benchmarks.lifecycle`: the two models, and one operation after the other on both."""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peftcore
from benchmarks.machine import machine
from peftcore.checkpoint import adapter_tensors

RANK = 8
LOAD = "load one more adapter"
DISABLE = "disable_adapter, in and out"

Times = dict[tuple[str, int], tuple[list[float], list[float]]]
"""{(operation, adapters loaded): (ours, PEFT's) in ms, one of each a round}; 0 loaded where the number says nothing."""


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


def pair(base: nn.Module, scratch: Path, rank: int) -> tuple[Any, Any]:
    """Ours and PEFT's with the same adapter, which lies in `scratch` then."""
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:  # at zero, as it starts, a merge would change nothing
            nn.init.normal_(parameter, std=0.01)
    theirs.save_pretrained(str(scratch))
    return peftcore.PeftModel.from_pretrained(copy.deepcopy(base), scratch), theirs.eval()


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
    torch.set_num_threads(1)
    times: Times = {}
    thin = thin_llama(options.blocks)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        measure_injection(times, thin, options.repeats)
        every = measure_loaded(times, pair(thin, folder / "thin", RANK), folder, options)
        real = pair(smollm(options.base), folder / "real", 2 * RANK)
        check_equal(*real)
        measure_merge(times, "SmolLM2-135M bf16: ", 0, *real, options.repeats)
    rows = [{"operation": o, "loaded": n, "ours": ours, "peft": theirs} for (o, n), (ours, theirs) in times.items()]
    return {
        "machine": f"{machine()}, peft {peft.__version__}",
        "layers": 7 * options.blocks,
        "rows": rows,
        "ours_at_every_count": every,
    }


def measure_injection(times: Times, base: nn.Module, repeats: int) -> None:
    options: dict[str, Any] = {"r": RANK, "target_modules": "all-linear"}
    for round_number in tqdm(range(-1, repeats), desc="injection"):
        ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
        record(
            times if round_number >= 0 else {},
            "add the first adapter",
            0,
            lambda model=ours: peftcore.get_peft_model(model, peftcore.LoraConfig(**options)),
            lambda model=theirs: peft.get_peft_model(model, peft.LoraConfig(**options)),
        )


def measure_loaded(
    times: Times, models: tuple[Any, Any], folder: Path, options: argparse.Namespace
) -> list[tuple[int, float]]:
    """Everything at each count of adapters; gives (count, ms) of each load of ours on the way there."""
    ours, theirs = models
    check_equal(ours, theirs)
    every, loaded = [], 1
    for count in tqdm(options.points, desc="adapters loaded"):
        for number in range(loaded + 1, count):
            every.append((number, timed(lambda n=number: ours.load_adapter(folder / "thin", f"a{n}"))))
            copy_adapter(theirs, f"a{number}")
        loaded = count - 1
        for _ in range(options.repeats):
            record(
                times,
                LOAD,
                count,
                lambda: ours.load_adapter(folder / "thin", "last"),
                lambda: theirs.load_adapter(str(folder / "thin"), "last"),
            )
            record(
                times, "delete one", count, lambda: ours.delete_adapter("last"), lambda: theirs.delete_adapter("last")
            )
        every.append((count, timed(lambda: ours.load_adapter(folder / "thin", "last"))))
        copy_adapter(theirs, "last")
        if count <= 20:
            measure_use(times, count, ours, theirs, folder, options.repeats)
        ours.delete_adapter("last")
        theirs.delete_adapter("last")
    return every


def copy_adapter(theirs: Any, name: str) -> None:
    """One more adapter in PEFT's model, layer by layer, for its own way takes seconds each."""
    config = theirs.peft_config["default"]
    for layer in theirs.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.update_layer(name, r=config.r, lora_alpha=config.lora_alpha, config=config)
    theirs.peft_config[name] = copy.copy(config)


def measure_use(times: Times, count: int, ours: Any, theirs: Any, folder: Path, repeats: int) -> None:
    """What is done with adapters that are there, "default" acting and "last" idle."""
    for _ in range(repeats):
        for name in ("last", "default"):
            record({} if name == "default" else times, "set_adapter", count, lambda n=name: ours.set_adapter(n),
                   lambda n=name: theirs.set_adapter(n))  # fmt: skip
        record(times, DISABLE, count, lambda: disable(ours), lambda: disable(theirs))
        record(
            times,
            "state dict of one",
            count,
            lambda: adapter_tensors(ours, "default"),
            lambda: peft.get_peft_model_state_dict(theirs, adapter_name="default"),
        )
        record(
            times,
            "save one",
            count,
            lambda: ours.save_pretrained(folder / "ours", selected_adapters=["default"]),
            lambda: theirs.save_pretrained(str(folder / "peft"), selected_adapters=["default"]),
        )
    measure_merge(times, "", count, ours, theirs, repeats)


def measure_merge(times: Times, which: str, count: int, ours: Any, theirs: Any, repeats: int) -> None:
    for round_number in range(-1, repeats):
        into = times if round_number >= 0 else {}
        record(into, f"{which}merge_adapter", count, ours.merge_adapter, theirs.merge_adapter)
        record(into, f"{which}unmerge_adapter", count, ours.unmerge_adapter, theirs.unmerge_adapter)
    both = [times[f"{which}{name}", count] for name in ("merge_adapter", "unmerge_adapter")]
    sums = [[a + b for a, b in zip(both[0][side], both[1][side], strict=True)] for side in (0, 1)]
    times[f"{which}merge and unmerge", count] = (sums[0], sums[1])


def disable(model: Any) -> None:
    with model.disable_adapter():
        pass


def record(times: Times, operation: str, count: int, ours: Callable[[], Any], theirs: Callable[[], Any]) -> None:
    """One round: ours, then PEFT's."""
    mine, its = times.setdefault((operation, count), ([], []))
    mine.append(timed(ours))
    its.append(timed(theirs))


def timed(call: Callable[[], Any]) -> float:
    """Wall time in ms; what the call gives is kept until it is over, so that freeing it is not counted."""
    start = time.perf_counter()
    kept = call()
    end = time.perf_counter()
    del kept
    return 1e3 * (end - start)
