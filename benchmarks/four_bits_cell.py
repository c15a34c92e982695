"""One cell of `benchmarks.four_bits`: one base with one calibration and start, untrained or trained from one seed."""

import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainingArguments, set_seed

from flows.base.folder import load_tokenizer, padding_id
from flows.base.model import load_for_training
from flows.data.rows import Row, read_rows
from flows.evaluation.scoring import row_losses
from flows.params import Quantization
from peftcore import (
    LoraConfig,
    TaskType,
    calibrate_rounding,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_from_data,
    set_peft_model_state_dict,
)
from peftcore.bases import base_weight
from peftcore.bases.gguf import GgufLinear
from peftcore.bases.gguf_blocks import FORMATS
from peftcore.train import AdapterTrainer, RightPaddingCollator

COLUMNS = ["input_ids", "labels"]


@dataclass(frozen=True)
class Arm:
    """Storage of the frozen base, how it is rounded, and where the adapter starts."""

    title: str
    storage: str = "nf4"
    """A value of `quantization.storage`, or a block format of GGUF files."""
    rounding: bool = False
    start: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    """Further options of the adapter's configuration."""


ARMS = {
    "bf16": Arm("16-bit", storage="none"),
    "nf4": Arm("NF4"),
    # LoftQ quantises the 16-bit weights itself, so that three rounds can change the base
    "loftq": Arm("NF4, LoftQ x3", storage="none", start="loftq", options=(("loftq_config", {"loftq_iter": 3}),)),
    "qera": Arm("NF4, QERA", start="qera"),
    "cloq": Arm("NF4, CLoQ's start", start="cloq"),
    "rounding": Arm("NF4, rounding", rounding=True),
    "q4_1": Arm("GGUF Q4_1", storage="Q4_1"),
    "q4_1-qera": Arm("GGUF Q4_1, QERA", storage="Q4_1", start="qera"),
    "q4_1-rounding": Arm("GGUF Q4_1, rounding", storage="Q4_1", rounding=True),
    "q4_1-rounding-qera": Arm("GGUF Q4_1, rounding, QERA", storage="Q4_1", rounding=True, start="qera"),
    "rounding-qera": Arm("NF4, rounding, QERA", rounding=True, start="qera"),
    "rounding-cloq": Arm("NF4, rounding, CLoQ's start", rounding=True, start="cloq"),
}


@dataclass(frozen=True)
class Setting:
    """What all cells of a table have in common."""

    data: Path
    calibration_rows: int
    test_rows: int
    rank: int
    learning_rate: float
    batch: int
    accumulation: int
    steps: int


class Cells:
    """Measures the cells of a setting. The arm measured last stays calibrated, for the next seed."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._arm: tuple[Path, Arm] | None = None
        self._model: Any = None
        self._start: dict[str, torch.Tensor] | None = None
        self._calibration: dict[str, Any] = {}

    def measure(self, base: Path, arm: Arm, seed: int | None) -> dict[str, Any]:
        """Calibrate one arm, train it from a seed (None: not at all) and evaluate it.

        Returns:
            Each held-out row's mean loss (nats a token) and tokens, the CPU seconds of calibration and start, the
            memory that they took beyond the model (bytes), and the CPU seconds of training.
        """
        pad = padding_id(load_tokenizer(base))
        if self._arm != (base, arm):
            self._model = self._start = self._arm = None  # one model at a time in memory
            self._calibration = {}
            set_seed(seed or 0)
            self._model = calibrated(self.setting, base, arm, pad, self._calibration)
            if arm.start is not None:  # computed from data: the same for each seed
                state = get_peft_model_state_dict(self._model)
                self._start = {name: tensor.clone() for name, tensor in state.items()}
            self._arm = (base, arm)
        set_seed(seed or 0)
        self._restart()
        cell = dict(self._calibration)
        if seed is not None:
            cell |= train(self.setting, self._model, pad, seed)
        held_out = read_rows(self.setting.data / "test.parquet", COLUMNS, self.setting.test_rows)
        losses = row_losses(self._model.eval(), held_out, pad, batch_size=16)
        return cell | {"losses": losses.means, "tokens": losses.tokens}

    def _restart(self) -> None:
        """Give the adapter its start again: the stored one, or one drawn with the present seed."""
        if self._start is not None:
            set_peft_model_state_dict(self._model, self._start)
            return
        self._model.delete_adapter("default")
        self._model.add_adapter("default", configuration(self.setting, Arm("drawn")))
        self._model.set_adapter("default")


def calibrated(setting: Setting, base: Path, arm: Arm, pad: int, cell: dict[str, Any]) -> Any:
    """Return the base with its adapter at the start; adds seconds and memory to the cell."""
    rows = read_rows(setting.data / "train.parquet", COLUMNS, setting.calibration_rows)
    collate = RightPaddingCollator(pad)
    batches = [collate(rows[first : first + 8]) for first in range(0, len(rows), 8)]
    packed = arm.storage in FORMATS
    storage = "none" if packed else arm.storage
    quantization = Quantization.model_validate({"storage": storage})  # double quantisation, bf16 compute
    longest = max(len(row["input_ids"]) for row in rows)
    model: Any = load_for_training(base, quantization, longest)
    if packed:
        pack(model, arm.storage)
    with measured(cell):
        if arm.rounding:
            calibrate_rounding(model, batches, base, forward=forward_without_logits)
        model = get_peft_model(model, configuration(setting, arm))
        if model.peft_config["default"].needs_data:
            initialize_from_data(model, batches, model_path=base, forward=forward_without_logits)
    return model


def pack(model: Any, format_name: str) -> None:
    """Replace the linear layers of the blocks by ones in a GGUF format, as `load_gguf_base` gives them."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings():
            sizes = layer.in_features, layer.out_features
            packed = GgufLinear(*sizes, format_name, layer.bias is not None, layer.weight.dtype)
            base_weight(packed).write(layer.weight)
            packed.bias = layer.bias
            model.set_submodule(path, packed, strict=True)


def configuration(setting: Setting, arm: Arm) -> LoraConfig:
    """Return LoRA on all linear layers with the arm's start."""
    return LoraConfig(
        r=setting.rank,
        lora_alpha=2 * setting.rank,
        target_modules="all-linear",
        task_type=TaskType.CAUSAL_LM,
        init_lora_weights=arm.start or True,
        **dict(arm.options),
    )


def forward_without_logits(model: Any, batch: Mapping[str, Any]) -> Any:
    """Run all blocks; logits are computed for the last token alone, and no loss."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return model(**inputs, use_cache=False, logits_to_keep=1)


@contextmanager
def measured(cell: dict[str, Any]) -> Iterator[None]:
    """Add the CPU seconds of the context, and its peak of resident memory above the start (bytes; Linux only)."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5", encoding="utf-8")  # the peak is the present size from here
    before, start = resident_sizes(), time.process_time()
    yield
    cell["calibration_seconds"] = time.process_time() - start
    if before is not None and (after := resident_sizes()) is not None:
        cell["calibration_memory"] = after[0] - before[1]


def resident_sizes() -> tuple[int, int] | None:
    """Return the peak and the present size of this process's resident memory (bytes); None without Linux's /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
    peak, now = (int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS"))
    return peak, now


def train(setting: Setting, model: Any, pad: int, seed: int) -> dict[str, Any]:
    """Train for the setting's steps; batches depend on the seed alone."""
    rows: list[Row] = read_rows(setting.data / "train.parquet", COLUMNS)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = AdapterTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                max_steps=setting.steps,
                per_device_train_batch_size=setting.batch,
                gradient_accumulation_steps=setting.accumulation,
                train_sampling_strategy="group_by_length",
                learning_rate=setting.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=max(1, setting.steps // 20),
                save_strategy="no",
                report_to=[],
                disable_tqdm=not sys.stderr.isatty(),
                log_level="error",
                dataloader_pin_memory=False,
                seed=seed,
            ),
            train_dataset=Dataset.from_list(rows),
            data_collator=RightPaddingCollator(pad),
        )
        trainer.remove_callback(PrinterCallback)
        start = time.process_time()
        trainer.train()
    return {"seconds": time.process_time() - start, "steps": trainer.state.global_step}
