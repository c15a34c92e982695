"""Which score of a rank-one piece says best what it is worth: one short LoRA, cut down to a budget by each score.

    python -m benchmarks.auto_rank_scores            # results/auto_rank_scores.md

SmolLM2-135M-Instruct learns docstrings with LoRA of rank 32 for a few steps on 96 rows. Every score then shares out
the same budgets of parameters, the adapter is cut down to each, and its loss is measured on rows that neither training
nor scores have seen. A score that cannot tell pieces of this adapter apart says how many a layer gets, and the layer
keeps those of the largest singular values. Means over seeds.

| score | what it is |
|---|---|
| credit | what the piece took off the loss of 32 other rows, that of `find_ranks` |
| change | σ² of the piece itself |
| gradient | σ² of the whole weight's gradient before training, on the same 32 rows |
| activations | share of the input's variance (EVA), on the same 32 rows |
| equal | the same rank for every layer |
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, set_seed

from benchmarks.auto_rank_cells import ALPHA, BATCH, RANK
from benchmarks.machine import machine
from benchmarks.steps import quiet
from flows.base.folder import padding_id
from flows.base.model import load_for_training
from flows.data.rows import read_rows
from flows.params import Quantization
from peftcore import LoraConfig, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.lora import Lora
from peftcore.methods.lora.variants.eva import PrincipalComponents
from peftcore.train import RightPaddingCollator
from peftcore.train.losses import IGNORED
from peftcore.train.model_loss import ModelLossCheck
from peftcore.train.rank_allocation import allocate_ranks
from peftcore.train.rank_attribution import attribute_loss, mean_loss, summed_loss, to_singular_directions

WIDE = 2 * RANK
TRAINED, SCORED, JUDGED = 96, 32, 64
"""Rows."""
SHARES = (0.5, 0.25, 0.125)
"""Budgets, as shares of the whole adapter."""
RATE = 5e-4


def main() -> None:
    options = parse()
    quiet()
    found = [losses(seed, options.base, options.data) for seed in tqdm(range(options.seeds), unit="seed", disable=None)]
    text = table(found)
    (options.folder / "auto_rank_scores.md").write_text(text, encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.auto_rank_scores", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--base", type=Path, default=Path("artifacts/base"), help="model folder")
    parser.add_argument("--data", type=Path, default=Path("artifacts/data"), help="folder of the prepared splits")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def losses(seed: int, base: Path, data: Path) -> dict[str, list[float]]:
    """{score: what being cut down to each of SHARES adds to the loss}, and the "whole" loss, in nats a token."""
    pad = padding_id(AutoTokenizer.from_pretrained(base, local_files_only=True))
    rows = read_rows(data / "train.parquet", ["input_ids", "labels"])
    order = np.random.default_rng(seed).permutation(len(rows))
    chosen = [rows[i] for i in order[: TRAINED + SCORED + JUDGED]]
    trained, scored, judged = (
        batches(part, pad)
        for part in (chosen[:TRAINED], chosen[TRAINED : TRAINED + SCORED], chosen[TRAINED + SCORED :])
    )
    set_seed(seed)
    model: Any = load_for_training(base, Quantization(storage="none"), longest=320)
    config = LoraConfig(r=WIDE, lora_alpha=ALPHA * WIDE // RANK, target_modules="all-linear")
    model = get_peft_model(model, config).eval()
    adapters: dict[str, Any] = adapter_set(model).of_method("default")
    before = of_gradients(model, adapters, scored) | {"activations": of_activations(model, adapters, scored)}
    train(model, trained)
    values = {path: to_singular_directions(adapter) for path, adapter in adapters.items()}
    scores = {
        "credit": {
            path: own.tolist()
            for path, own in attribute_loss(model, adapters, scored, ModelLossCheck(), lambda: None).items()
        },
        "change": {path: own.square().tolist() for path, own in values.items()},
        **before,
        "equal": None,
    }
    whole = mean_loss(model, judged, ModelLossCheck())
    added = {
        name: [loss - whole for loss in cut_down(model, adapters, score, judged, own=name == "credit")]
        for name, score in scores.items()
    }
    return added | {"whole": [whole]}


def batches(rows: Sequence[Any], pad: int) -> list[dict[str, Tensor]]:
    collate = RightPaddingCollator(pad)
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    return [collate(rows[first : first + BATCH]) for first in range(0, len(rows), BATCH)]


def train(model: Any, data: list[dict[str, Tensor]]) -> None:
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    check = ModelLossCheck()
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    for step in torch.randperm(len(data)).tolist():
        total, count = summed_loss(model, data[step], check)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()


# -- scores ----------------------------------------------------------------------------------------------------------

Scores = dict[str, list[float]]


def of_gradients(model: Any, adapters: Mapping[str, Lora], data: list[dict[str, Tensor]]) -> dict[str, Scores]:
    """B is still zero, so the loss is the base's; with G known, σ² of its best WIDE directions."""
    weights = {path: adapter.base.layer.weight for path, adapter in adapters.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    check = ModelLossCheck()
    for batch in data:
        summed_loss(model, batch, check)[0].backward()
    scores = {path: torch.linalg.svdvals(w.grad.float())[:WIDE].square().tolist() for path, w in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = None
    return {"gradient": scores}


@torch.no_grad()
def of_activations(model: Any, adapters: Mapping[str, Lora], data: list[dict[str, Tensor]]) -> Scores:
    found = {path: PrincipalComponents(WIDE) for path in adapters}
    mask = torch.empty(0)

    def watch(path: str) -> Any:
        return lambda module, inputs, output: found[path].add(inputs[0][mask], 0.99)

    hooks = [adapter.base.layer.register_forward_hook(watch(path)) for path, adapter in adapters.items()]
    with model.disable_adapter():
        for batch in data:
            mask = batch["labels"] != IGNORED
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for hook in hooks:
        hook.remove()
    return {path: components.explained().tolist() for path, components in found.items()}


# -- judging ---------------------------------------------------------------------------------------------------------


def cut_down(
    model: Any, adapters: Mapping[str, Lora], score: Scores | None, judged: list[dict[str, Tensor]], own: bool
) -> list[float]:
    """own: the score is of this adapter's very pieces, in their order."""
    costs = {path: adapter.base.in_features + adapter.base.out_features for path, adapter in adapters.items()}
    factors = {path: adapter.lora_B_weight.detach().clone() for path, adapter in adapters.items()}
    found = []
    for share in SHARES:
        if score is None:
            ranks = {path: round(share * WIDE) for path in costs}
        else:
            ranks = allocate_ranks(score, costs, int(share * WIDE * sum(costs.values())), least=0)
        with torch.no_grad():
            for path, adapter in adapters.items():
                order = torch.arange(WIDE)
                if own and score is not None:
                    order = torch.tensor(score[path]).argsort(descending=True, stable=True)
                adapter.lora_B_weight.copy_(factors[path]).index_fill_(1, order[ranks[path] :], 0.0)
        found.append(mean_loss(model, judged, ModelLossCheck()))
    with torch.no_grad():
        for path, adapter in adapters.items():
            adapter.lora_B_weight.copy_(factors[path])
    return found


def table(found: list[dict[str, list[float]]]) -> str:
    """Markdown: a row for each score; the loss that cutting down costs."""
    whole = np.mean([one["whole"] for one in found])
    lines = [
        f"LoRA of rank {WIDE} on docstrings, {TRAINED} rows, {len(found)} seeds: held-out loss {whole:.3f} nats a "
        "token; what cutting it down to a share of its parameters adds (standard deviation over seeds).",
        "",
        "| score | " + " | ".join(f"1/{round(1 / share)}" for share in SHARES) + " |",
        "|---|" + "---:|" * len(SHARES),
    ]
    for name in [name for name in found[0] if name != "whole"]:
        added = np.array([one[name] for one in found])
        cells = " | ".join(f"{m:+.4f} ({s:.4f})" for m, s in zip(added.mean(0), added.std(0, ddof=1), strict=True))
        lines.append(f"| {name} | {cells} |")
    return "\n".join([*lines, "", f"Measured on {machine()}."]) + "\n"


if __name__ == "__main__":
    main()
