"""Checkpoints and resuming inside transformers' Trainer: a run that was ended anywhere goes on as if it had not been.

What Trainer keeps by itself: optimiser, scheduler, gradient scaler, every process's random states, the place in the
epoch. What it does not, and is added here: adapters with their averages and masks, callbacks' own state (early
stopping), the loss since the last record, an evaluation that is still due; checkpoints that are whole or do not count.
"""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import EarlyStoppingCallback, TrainerState
from transformers.trainer_callback import ExportableState

from peftcore.errors import TrainingError
from peftcore.files import damaged_files
from peftcore.train.checkpoints import (
    TRAINER_STATE,
    checkpoint_written,
    copy_adapters,
    is_finished,
    keep_latest,
    last_good_checkpoint,
)
from peftcore.train.objective import adapted_model
from peftcore.train.termination import TerminationMixin

ADAPTER_STATE = "adapter_state.safetensors"
"""File of a checkpoint that holds what resuming needs beyond the adapters' saved weights."""
RUN_STATE = "run_state.pt"
"""File of a checkpoint that holds where the run stood between two records: see `ResumeMixin._run_state`."""
FAULT_STATE = "fault_state.json"
"""File of a checkpoint that holds what has gone wrong so far, and what the next losses are compared with."""


class ResumeMixin(TerminationMixin):
    """The part of AdapterTrainerMixin that saves and resumes."""

    _resumed_from: Path | None = None
    """The checkpoint of which something is still to be taken up."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; `resume_from_checkpoint=True` is the last whole checkpoint of `output_dir`.

        Raises TrainingError where there is none, or where the one that is named is damaged; SystemExit after a signal
        of `termination_signals`, whose checkpoint is then the last.
        """
        chosen = self._chosen_checkpoint(resume_from_checkpoint)
        self._resumed_from = None if chosen is None else Path(chosen)
        self._regularizers.clear()
        self.start_watching(self.faults)
        with self.start_termination():
            return super().train(chosen, *args, **kwargs)

    def _chosen_checkpoint(self, asked: str | bool | None) -> str | None:
        if not asked:
            return None
        if asked is True:
            main = self.accelerator.is_main_process
            found = [last_good_checkpoint(Path(str(self.args.output_dir))) if main else None]
            broadcast_object_list(found)  # reading at other moments, the others might find another
            if found[0] is None:
                raise TrainingError(f"no whole checkpoint to resume from in {self.args.output_dir}")
            return str(found[0])
        damaged = damaged_files(Path(asked))
        if damaged:
            raise TrainingError(
                f"{asked} is damaged ({', '.join(damaged)}); resume_from_checkpoint=True takes the last whole one"
            )
        return str(asked)

    # -- saving ------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_directory = Path(self._get_output_dir(trial))
        folder = run_directory / f"checkpoint-{self.state.global_step}"
        writes = self.args.should_save
        stored: Any = self.state.stateful_callbacks
        for held in stored.values():
            if isinstance(held, list):
                held.clear()  # Trainer appends to it
        # Older checkpoints go only once this one counts, so rotation waits until it is sealed.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        run_state = self._run_state()
        try:
            with checkpoint_written(folder) if writes else nullcontext():
                self.accelerator.wait_for_everyone()  # the folder is empty before any process writes to it
                super()._save_checkpoint(model, trial)
                if writes:
                    torch.save(run_state, folder / RUN_STATE)
                    (folder / FAULT_STATE).write_text(json.dumps(self.fault_state()))
                    self._save_adapter_state(folder)
                self.accelerator.wait_for_everyone()  # and holds every process's random states before it is sealed
        finally:
            self.args.save_total_limit = limit
        if writes:
            self._drop_old(folder)
        self.accelerator.wait_for_everyone()  # a process that ends sooner would take the writing one with it
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _drop_old(self, current: Path) -> None:
        best = self.state.best_model_checkpoint
        keep_latest(current, self.args.save_total_limit, None if best is None else Path(best))

    def _save_adapter_state(self, folder: Path) -> None:
        state = adapted_model(self).adapter_state()
        if state:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
            save_file(tensors, folder / ADAPTER_STATE, metadata={"format": "pt"})

    def _run_state(self) -> dict[str, Any]:
        """What was summed up since the last record, the step of that record, and what is due at this step."""
        return {
            "loss": self.accelerator.reduce(self._tr_loss, "mean"),
            "regularizers": list(self._regularizers),
            "good_losses": list(self._good_losses),
            "counts": dict(self._counts),
            "logged_step": self._globalstep_last_logged,
            "evaluation_due": self._evaluation_due,
            "save_due": self._save_due,
        }

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Trainer's, of a checkpoint that counts, with all its adapters, whether HF PEFT is installed or not."""
        if self.is_world_process_zero():
            if not is_finished(Path(checkpoint_folder)):
                return  # Trainer asks before it is sealed
            copy_adapters(Path(checkpoint_folder), Path(str(self.args.output_dir)))
        super()._push_from_checkpoint(checkpoint_folder)

    # -- resuming ----------------------------------------------------------------------------------------------

    def _run_epoch(self, model: nn.Module, epoch: int, *args: Any, **kwargs: Any) -> None:
        self._take_up(epoch)
        stopped = any(
            isinstance(callback, EarlyStoppingCallback)
            and callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
        )
        stopped = stopped or self.control.should_training_stop  # by an evaluation that was made up for
        if stopped or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True  # Trainer looks only after one more step
        else:
            super()._run_epoch(model, epoch, *args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._take_up(int(self.state.epoch or 0))  # here if no epoch was left
        last = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and last.exists():
            self._drop_old(last)  # a run that was killed before it could
        return super()._finalize_training(*args, **kwargs)

    def _take_up(self, epoch: int) -> None:
        """Go on between two records as the run did that was ended, and evaluate if it was ended before it could."""
        checkpoint, self._resumed_from = self._resumed_from, None
        if checkpoint is None or not (checkpoint / RUN_STATE).exists():
            return
        # among several processes on a CPU the device is "cpu:0", which torch.load does not know
        device = "cpu" if self.args.device.type == "cpu" else self.args.device
        held = torch.load(checkpoint / RUN_STATE, map_location=device, weights_only=True)
        self._tr_loss += held["loss"]
        self._globalstep_last_logged = held["logged_step"]
        self._regularizers.extend(held["regularizers"])
        self._good_losses.extend(held["good_losses"])
        self._counts.update(held["counts"])
        if held["evaluation_due"]:
            self._load_rng_state(str(checkpoint))
            self.loop.epoch_ended = True
            self.control.should_evaluate, self.control.should_save = True, held["save_due"]
            self._maybe_log_save_evaluate(self._tr_loss, None, self.model_wrapped, None, epoch, None, 0.0)

    def _load_callback_state(self) -> None:
        """Callbacks go on in place, always: early stopping that counted anew would end the run elsewhere."""
        stored: Any = self.state.stateful_callbacks
        for callback in self.callback_handler.callbacks:
            if not isinstance(callback, ExportableState):
                continue
            held = stored.setdefault(type(callback).__name__, callback.state())
            if isinstance(held, list):  # of several of one class, each takes the next
                held = held.pop(0) if held else callback.state()
            vars(callback).update(held["attributes"])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_adapters(Path(resume_from_checkpoint))
        faults = Path(resume_from_checkpoint) / FAULT_STATE
        if faults.exists():
            self.load_fault_state(json.loads(faults.read_text()))

    def _load_best_model(self) -> None:
        self._load_adapters(Path(str(self.state.best_model_checkpoint)))

    def finish_from(self, checkpoint: Path) -> None:
        """Take over a run that is finished and whose last checkpoint this is: its state, and its best adapter."""
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
        self._load_best_model()

    def _load_adapters(self, checkpoint: Path) -> None:
        model = adapted_model(self)
        file = checkpoint / ADAPTER_STATE
        state = load_file(file) if file.exists() else {}
        model.load_adapter_state(state)  # first, because it may say how many triplets the saved weights hold
        for name in model.peft_config:
            model.load_adapter_weights(checkpoint if name == "default" else checkpoint / name, name)
        model.load_adapter_state(state)  # again, because saving drops what a mask hides and training goes on with it
