"""SIGTERM during training: the run ends after the present optimiser step, with a checkpoint to resume from.

Schedulers (SLURM, Kubernetes, torchrun, spot instances) send SIGTERM some seconds before SIGKILL. Only the first signal
counts, because schedulers may send several.
"""

import logging
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

log = logging.getLogger(__name__)


class EvaluationStopped(Exception):
    """An evaluation was interrupted, because the process has to end."""


class SignalListener:
    """Context that records the first of `signals` to arrive, and restores the earlier handlers on exit.

    Handlers are replaced in the main thread only, because other threads receive no signals. A handler that Python did
    not install stays, because it could not be restored. A signal that nobody acted on is raised again on exit.
    """

    def __init__(self, signals: Sequence[signal.Signals]) -> None:
        self.signals = tuple(signals)
        self.number: int | None = None
        """Number of the signal that has arrived."""
        self._handlers_before: dict[int, Any] = {}

    def __enter__(self) -> "SignalListener":
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                if signal.getsignal(number) is not None:
                    self._handlers_before[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        if self.number is not None and kind is None:
            signal.raise_signal(self.number)

    def _record(self, number: int, _frame: FrameType | None) -> None:
        self.number = self.number or number

    def received(self, accelerator: Accelerator) -> bool:
        """Return True if a signal has arrived at any process. A collective call, so all processes agree."""
        if accelerator.num_processes > 1 and self.signals:
            number = torch.tensor([self.number or 0], device=accelerator.device)
            numbers: Any = accelerator.gather(number)
            self.number = int(numbers.max()) or None
        return self.number is not None

    @property
    def name(self) -> str:
        """The signal's name, such as SIGTERM."""
        return "no signal" if self.number is None else signal.Signals(self.number).name

    @property
    def exit_status(self) -> int:
        """Exit status by the shell's convention for a signal: 143 for SIGTERM."""
        return 128 + (self.number or 0)


class Termination:
    """Decides when a run ends after a signal, and which evaluation the resumed run has to make up for."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.listener = SignalListener(trainer.termination_signals)
        self.evaluation_due = self.save_due = False
        """Actions of this step that the resumed run has to make up for."""
        self.epoch_ended = self.saved = False
        """Position in Trainer's loop: after an epoch's last step; after saving at this step."""
        self._requested = False  # at this step, and agreed on by all processes

    def start_actions(self) -> None:
        """Postpone this step's evaluation if a signal has arrived. Called before logging, evaluating and saving."""
        self.saved = False
        self._requested = self.listener.received(self.trainer.accelerator)
        if self._requested:
            self.postpone_evaluation()

    def postpone_evaluation(self) -> None:
        """Leave the evaluation and the saving of this step to the resumed run."""
        self._requested = True
        control = self.trainer.control
        if control.should_evaluate:
            self.evaluation_due = True
            self.save_due = self.save_due or control.should_save
        control.should_evaluate = control.should_save = False

    def interrupt_evaluation(self) -> None:
        """Raise EvaluationStopped if a signal has arrived during an evaluation of the training loop.

        Several processes would have to communicate at every batch to agree, so they complete the evaluation.
        """
        trainer = self.trainer
        if trainer.accelerator.num_processes == 1 and trainer.is_in_train and self.listener.number is not None:
            raise EvaluationStopped

    def ends_run(self, epoch: float) -> bool:
        """Return True if the run ends at this step. Called after logging, evaluating and saving; epoch: from 0."""
        # after saving, which takes time, the processes look for a signal once more
        if not self._requested and not (self.saved and self.listener.received(self.trainer.accelerator)):
            return False
        # An epoch's last step is followed by the actions at the end of the epoch; the run ends after those.
        control, state = self.trainer.control, self.trainer.state
        last_step = control.should_training_stop or control.should_epoch_stop or (state.epoch or 0) >= epoch + 1
        return self.epoch_ended or not last_step

    def exit(self, run_directory: str) -> None:
        """Raise SystemExit with the signal's exit status."""
        state = self.trainer.state
        if self.trainer.is_world_process_zero():
            log.warning(
                "ended by %s after step %d of %d; the checkpoint is in %s",
                *(self.listener.name, state.global_step, state.max_steps, run_directory),
            )
        raise SystemExit(self.listener.exit_status)
