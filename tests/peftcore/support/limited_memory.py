"""A training whose process gets less memory than its batch needs."""

import json
import logging
import resource
from pathlib import Path

from datasets import Dataset
from quiet_training import trained
from tiny_training import adapted, trainer


def train_limited(folder: Path) -> None:
    """Train without a limit, then with one, and write what was warned of and how far the two adapters are apart."""
    data = Dataset.from_dict({"input_ids": [[1 + i % 40] * 400 for i in range(8)], "labels": [[3] * 400] * 8})
    models = [adapted().double(), adapted().double()]
    warned: list[str] = []
    logging.getLogger("peftcore.train.out_of_memory").addFilter(lambda record: bool(warned.append(record.getMessage())))
    rows_at_once = None
    for number, model in enumerate(models):
        model.set_attn_implementation("eager")  # 400 x 400 probabilities for each head
        made = trainer(model, folder / str(number), data, max_steps=2, per_device_train_batch_size=8)
        made.train()
        rows_at_once = made.splitter.rows_at_once
        resource.setrlimit(resource.RLIMIT_AS, (_used() + (90 << 20), resource.RLIM_INFINITY))  # half of 8 rows' need
    changed = trained(models[1])
    worst = max((t - changed[name]).abs().max().item() for name, t in trained(models[0]).items())
    (folder / "found.json").write_text(json.dumps({"warned": warned, "worst": worst, "rows": rows_at_once}))


def _used() -> int:
    """Bytes of address space."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmSize:")) << 10
