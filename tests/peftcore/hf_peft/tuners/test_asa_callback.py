import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.adamss.asa_callback import AdamssAsaCallback as HfPeftCallback
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import peftcore
from peftcore.hf_peft.tuners.asa_callback import AdamssAsaCallback

OPTIONS: dict[str, Any] = {
    "r": 6,
    "num_subspaces": 4,
    "subspace_rank": 2,
    "target_modules": ["0"],
    "use_asa": True,
    "asa_target_subspaces": 2,
    "init_warmup": 1,
    "final_warmup": 4,
    "mask_interval": 1,
}


class Net(nn.Sequential):
    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        y = super().forward(x)
        return {"loss": (y - labels).square().mean(), "logits": y}


def trained(library: Any, callback: Any, directory: Path) -> tuple[list[bool], list[float]]:
    """Return (whether each parameter of the adapter still trains, losses) after a run of Trainer."""
    torch.manual_seed(0)
    base = Net(nn.Linear(12, 12))
    data = [{"x": torch.randn(12), "labels": torch.randn(12)} for _ in range(12)]
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library.get_peft_model(base, library.AdamssConfig(**OPTIONS))
    adapter = [p for p in model.parameters() if p.requires_grad]
    arguments = TrainingArguments(
        str(directory), per_device_train_batch_size=2, num_train_epochs=1, learning_rate=0.1, logging_steps=1,
        report_to=[], save_strategy="no", label_names=["labels"], use_cpu=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback()])  # type: ignore[arg-type]
    trainer.train()
    return [p.requires_grad for p in adapter], [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own call
def test_a_plain_trainer_freezes_the_subspaces_that_it_freezes_with_hf_peft(tmp_path: Path) -> None:
    (flags, losses), (expected_flags, expected) = (
        trained(peftcore, AdamssAsaCallback, tmp_path),
        trained(peft, HfPeftCallback, tmp_path),
    )
    assert flags == expected_flags and False in flags
    assert losses == pytest.approx(expected, rel=1e-4)
