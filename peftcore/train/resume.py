"""Checkpoints of a run and exact resumption: a resumed run continues as if it had not been interrupted.

Trainer saves optimiser, schedule, gradient scaler, the random states of every process and the position in the epoch.
This module adds the adapters with their training state (averages, masks), the state of callbacks (early stopping), the
loss since the last record and an evaluation that is still due. A checkpoint counts only when it is complete.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from transformers import EarlyStoppingCallback
from transformers.trainer_callback import ExportableState

from peftcore.errors import TrainingError
from peftcore.files import damaged_files
from peftcore.train.checkpoints import checkpoint_written, keep_latest, last_good_checkpoint

ADAPTER_STATE = "adapter_state.safetensors"
"""Checkpoint file: training state of the adapters, beyond their weights."""
RUN_STATE = "run_state.pt"
"""Checkpoint file: position of the run between two training records; see `Resume._run_state`."""
FAULT_STATE = "fault_state.json"
"""Checkpoint file: state of the step guard and of the batch splitter."""


class Resume:
    """Saves and restores what a run needs to continue exactly."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._pending: Path | None = None
        """Checkpoint whose run state is still to be restored."""

    def choose(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Return the checkpoint to resume from. None: start from the beginning.

        Args:
            resume_from_checkpoint: A checkpoint folder, or True for the last complete one of the output directory.

        Raises:
            TrainingError: There is no complete checkpoint, or the named one is damaged.
        """
        checkpoint = self._chosen(resume_from_checkpoint)
        self._pending = None if checkpoint is None else Path(checkpoint)
        return checkpoint

    def _chosen(self, asked: str | bool | None) -> str | None:
        if not asked:
            return None
        if asked is True:
            output, main = self.trainer.args.output_dir, self.trainer.accelerator.is_main_process
            chosen = [last_good_checkpoint(Path(str(output))) if main else None]
            broadcast_object_list(chosen)  # processes that look at other moments could find other checkpoints
            if chosen[0] is None:
                raise TrainingError(f"no complete checkpoint to resume from in {output}")
            return str(chosen[0])
        damaged = damaged_files(Path(asked))
        if damaged:
            raise TrainingError(
                f"{asked} is damaged ({', '.join(damaged)}); resume_from_checkpoint=True takes the last complete one"
            )
        return str(asked)

    # -- saving ------------------------------------------------------------------------------------------------

    @contextmanager
    def checkpoint(self, trial: Any) -> Iterator[None]:
        """Complete the checkpoint that Trainer writes inside; if writing fails, the earlier one of this step stays."""
        trainer = self.trainer
        folder = Path(trainer._get_output_dir(trial)) / f"checkpoint-{trainer.state.global_step}"
        writes = trainer.args.should_save
        for states in trainer.state.stateful_callbacks.values():
            if isinstance(states, list):
                states.clear()  # Trainer appends to this list
        # Older checkpoints are deleted only after this one is complete, so Trainer must not rotate them.
        limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
        run_state = self._run_state()
        try:
            with checkpoint_written(folder) if writes else nullcontext():
                trainer.accelerator.wait_for_everyone()  # the folder is empty before any process writes to it
                yield
                if writes:
                    torch.save(run_state, folder / RUN_STATE)
                    faults = trainer.guard.state() | {"rows_at_once": trainer.splitter.rows_at_once}
                    (folder / FAULT_STATE).write_text(json.dumps(faults), encoding="utf-8")
                    self._save_adapter_state(folder)
                trainer.accelerator.wait_for_everyone()  # every process has written its random states
        finally:
            trainer.args.save_total_limit = limit
        if writes:
            self._delete_old(folder)
        trainer.accelerator.wait_for_everyone()  # a process that exits earlier would end the writing one
        if trainer.args.push_to_hub:
            trainer._push_from_checkpoint(str(folder))

    def _delete_old(self, current: Path) -> None:
        best = self.trainer.state.best_model_checkpoint
        keep_latest(current, self.trainer.args.save_total_limit, None if best is None else Path(best))

    def delete_old_checkpoints(self) -> None:
        """Delete checkpoints beyond `save_total_limit` that an interrupted run could not delete any more."""
        last = Path(str(self.trainer.args.output_dir)) / f"checkpoint-{self.trainer.state.global_step}"
        if self.trainer.args.should_save and last.exists():
            self._delete_old(last)

    def _save_adapter_state(self, folder: Path) -> None:
        state = self.trainer.adapted_model.adapter_state()
        if state:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
            save_file(tensors, folder / ADAPTER_STATE, metadata={"format": "pt"})

    def _run_state(self) -> dict[str, Any]:
        """Return sums since the last training record, the step of that record, and the actions due at this step."""
        trainer = self.trainer
        return {
            "loss": trainer.accelerator.reduce(trainer._tr_loss, "mean"),
            "regularizers": list(trainer.regularizer.values),
            "good_losses": list(trainer.guard.good_losses),
            "counts": dict(trainer.guard.counts),
            "logged_step": trainer._globalstep_last_logged,
            "evaluation_due": trainer.termination.evaluation_due,
            "save_due": trainer.termination.save_due,
            "objective": trainer.training_objective.state(),
        }

    # -- resuming ----------------------------------------------------------------------------------------------

    def restore_run_state(self, epoch: int) -> None:
        """Restore sums since the last training record, and evaluate if the interrupted run still had to."""
        trainer = self.trainer
        checkpoint, self._pending = self._pending, None
        if checkpoint is None or not (checkpoint / RUN_STATE).exists():
            return
        # among several processes on a CPU the device is "cpu:0", which torch.load does not know
        device = "cpu" if trainer.args.device.type == "cpu" else trainer.args.device
        state = torch.load(checkpoint / RUN_STATE, map_location=device, weights_only=True)
        trainer._tr_loss += state["loss"]
        trainer._total_loss_scalar -= state["loss"].item()  # `train_loss` is the mean of the steps of this call alone
        trainer._globalstep_last_logged = state["logged_step"]
        trainer.regularizer.values.extend(state["regularizers"])
        trainer.guard.good_losses.extend(state["good_losses"])
        trainer.guard.counts.update(state["counts"])
        if "objective" in state:  # a checkpoint of an earlier version lacks it
            trainer.training_objective.load_state(state["objective"])
        if state["evaluation_due"]:
            trainer._load_rng_state(str(checkpoint))
            trainer.termination.epoch_ended = True
            trainer.control.should_evaluate, trainer.control.should_save = True, state["save_due"]
            trainer._maybe_log_save_evaluate(trainer._tr_loss, None, trainer.model_wrapped, None, epoch, None, 0.0)

    def run_is_complete(self) -> bool:
        """Return True if a resumed run has no steps left: all steps are done, or early stopping has ended the run."""
        trainer = self.trainer
        stopped = any(
            isinstance(callback, EarlyStoppingCallback)
            and callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in trainer.callback_handler.callbacks
        )
        # `should_training_stop` may come from the evaluation that `restore_run_state` has made up for
        return stopped or trainer.control.should_training_stop or trainer.state.global_step >= trainer.state.max_steps

    def load_callback_states(self) -> None:
        """Restore the state of callbacks in place; early stopping would else count anew and end the run elsewhere."""
        stored: Any = self.trainer.state.stateful_callbacks
        for callback in self.trainer.callback_handler.callbacks:
            if not isinstance(callback, ExportableState):
                continue
            state = stored.setdefault(type(callback).__name__, callback.state())
            if isinstance(state, list):  # several callbacks of one class: each takes the next state
                state = state.pop(0) if state else callback.state()
            vars(callback).update(state["attributes"])

    def load_checkpoint(self, checkpoint: Path) -> None:
        """Load the adapters of a checkpoint, and the state of the step guard and of the batch splitter."""
        self.load_adapters(checkpoint)
        file = checkpoint / FAULT_STATE
        if file.exists():
            state = json.loads(file.read_text(encoding="utf-8"))
            self.trainer.guard.load_state(state)
            self.trainer.splitter.rows_at_once = state["rows_at_once"]

    def load_adapters(self, checkpoint: Path) -> None:
        """Load the weights and the training state of all adapters of a checkpoint."""
        self.trainer.processes.reshard()
        model = self.trainer.adapted_model
        file = checkpoint / ADAPTER_STATE
        state = load_file(file) if file.exists() else {}
        model.load_adapter_state(state)  # first, because AdaLoRA's state holds the number of triplets saved
        for name in model.peft_config:
            model.load_adapter_weights(checkpoint if name == "default" else checkpoint / name, name)
        model.load_adapter_state(
            state
        )  # again, because saved weights lack masked values, with which training continues
