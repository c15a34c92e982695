"""Methods of every kind learn the pipeline's own task on the real base: SmolLM2 in bf16, 30 steps of 8 rows."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import peftcore
from flows.base_model import load_tokenizer, padding_id
from flows.rows import Row, read_rows
from peftcore import get_peft_model
from peftcore.train import RightPaddingCollator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
STEPS, BATCH, LONGEST = 30, 8, 160
ATTENTION = ["q_proj", "v_proj"]
METHODS: dict[str, tuple[Callable[[], Any], float, float]] = {
    "DoRA": (lambda: peftcore.LoraConfig(r=8, use_dora=True, target_modules=ATTENTION), 1e-3, 2.9),
    "IA3": (lambda: peftcore.IA3Config(task_type="CAUSAL_LM"), 1e-2, 2.8),
    "OFT": (lambda: peftcore.OFTConfig(oft_block_size=32, target_modules=ATTENTION), 1e-3, 2.7),
    "LN tuning": (lambda: peftcore.LNTuningConfig(), 3e-3, 2.8),
    "prompt tuning": (lambda: peftcore.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16), 3e-2, 3.2),
    "prefix tuning": (
        lambda: peftcore.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16, init_weights="zero"),
        1e-2,
        3.2,
    ),
}
"""{method: (its configuration, learning rate, validation loss that it must get below)}; the base has about 3.5."""


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fetched base and the prepared rows: the checkout's own, or made in a clone of it."""
    if (ROOT / "artifacts" / "data" / "report.json").exists():
        return ROOT / "artifacts"
    clone = tmp_path_factory.mktemp("docstrings") / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["dvc", "repro", "prepare"], cwd=clone, env=environment, check=True, capture_output=True)
    return clone / "artifacts"


def short_rows(artifacts: Path, split: str, count: int) -> list[Row]:
    rows = read_rows(artifacts / "data" / f"{split}.parquet", ["input_ids", "labels"])
    return [row for row in rows if len(row["input_ids"]) <= LONGEST][:count]


@torch.no_grad()
def loss_on(model: Any, rows: list[Row], collate: RightPaddingCollator) -> float:
    """Nats a labelled token."""
    model.eval()
    total, labels = 0.0, 0
    for start in range(0, len(rows), BATCH):
        batch = collate(rows[start : start + BATCH])
        count = int((batch["labels"] != -100).sum())
        total, labels = total + float(model(**batch).loss) * count, labels + count
    return total / labels


@pytest.mark.parametrize("method", METHODS)
def test_it_learns(method: str, artifacts: Path) -> None:
    make, rate, bound = METHODS[method]
    train, validation = short_rows(artifacts, "train", STEPS * BATCH), short_rows(artifacts, "validation", 32)
    collate = RightPaddingCollator(padding_id(load_tokenizer(artifacts / "base")))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(artifacts / "base", dtype=torch.bfloat16)
    assert loss_on(model, validation, collate) > 3.4
    model = get_peft_model(model, make()).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=STEPS)
    for step in range(STEPS):
        model(**collate(train[step * BATCH : (step + 1) * BATCH])).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert loss_on(model, validation, collate) < bound
