"""SIGTERM while training: noted when it comes, acted on where the run can be taken up again.

Schedulers (SLURM, Kubernetes, torchrun, spot instances) send it some seconds before SIGKILL. They may send it more than
once, so only the first counts.
"""

import logging
import random
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from peftcore.train.steps import StepMixin

log = logging.getLogger(__name__)


class EvaluationStopped(Exception):
    """An evaluation was left because the process is to end."""


class Termination:
    """Context that notes the first of `signals` to come; outside of it they do what they did before.

    A thread that is not the main one cannot receive signals, and a handler that is not Python's cannot be put back; in
    both cases nothing is changed. A signal that came too late for anybody to look is raised again at the end.
    """

    def __init__(self, signals: Sequence[signal.Signals]) -> None:
        self.signals = tuple(signals)
        self.number: int | None = None
        """The signal that has come."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Termination":
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                if signal.getsignal(number) is not None:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.number is not None and kind is None:
            signal.raise_signal(self.number)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.number = self.number or number

    def asked(self, accelerator: Accelerator) -> bool:
        """Whether a signal has come to any of the processes; a collective call, so all of them find the same."""
        if accelerator.num_processes > 1 and self.signals:
            own = torch.tensor([self.number or 0], device=accelerator.device)
            everyone: Any = accelerator.gather(own)
            self.number = int(everyone.max()) or None
        return self.number is not None

    @property
    def name(self) -> str:
        """The signal's name, such as SIGTERM."""
        return "no signal" if self.number is None else signal.Signals(self.number).name

    @property
    def status(self) -> int:
        """The exit status that says which signal ended a process, as a shell does: 143 for SIGTERM."""
        return 128 + (self.number or 0)


class _Loop(TrainerCallback):
    """Follows Trainer's loop: what has just happened in it, and whether an evaluation should be left."""

    def __init__(self, trainer: "TerminationMixin") -> None:
        self.trainer = trainer
        self.epoch_ended = self.saved = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch_ended = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch_ended = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = True

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Several processes would have to agree at every batch; they finish the evaluation instead.
        alone = self.trainer.accelerator.num_processes == 1
        if alone and self.trainer.is_in_train and self.trainer.termination.number is not None:
            raise EvaluationStopped


class TerminationMixin(StepMixin):
    """The part of AdapterTrainerMixin that saves and exits when it is told to."""

    termination_signals: ClassVar[Sequence[signal.Signals]] = (signal.SIGTERM,)
    """Signals upon which `train` saves a checkpoint after the current optimiser step and raises SystemExit(128 + the
    signal's number); () turns it off."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loop = _Loop(self)
        self.add_callback(self.loop)
        self.start_termination()

    def start_termination(self) -> Termination:
        """The context of one run, in which nothing is due yet."""
        self._evaluation_due = self._save_due = False
        self.termination = Termination(self.termination_signals)
        return self.termination

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, epoch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Trainer's. Once asked to end, it logs, saves and exits; an evaluation is left to the run that goes on."""
        self.loop.saved = False
        asked = self.termination.asked(self.accelerator)
        if asked:
            self._leave_evaluation()
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, epoch, *args, **kwargs)
        except EvaluationStopped:
            asked = True
            self._leave_evaluation()
        asked = asked or (self.loop.saved and self.termination.asked(self.accelerator))
        # What is due at the end of an epoch comes after its last step, so that there is the place to stop.
        ends = self.control.should_training_stop or self.control.should_epoch_stop
        if not asked or (not self.loop.epoch_ended and (ends or (self.state.epoch or 0) >= epoch + 1)):
            return
        if not self.loop.saved:
            self._save_checkpoint(model, trial)
        if self.is_world_process_zero():
            log.warning(
                "ended by %s after step %d of %d, whose checkpoint is saved in %s",
                *(self.termination.name, self.state.global_step, self.state.max_steps, self._get_output_dir(trial)),
            )
        raise SystemExit(self.termination.status)

    def _leave_evaluation(self) -> None:
        if self.control.should_evaluate:
            self._evaluation_due = True
            self._save_due = self._save_due or self.control.should_save
        self.control.should_evaluate = self.control.should_save = False

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; training goes on with the random numbers it would have had without."""
        with _random_states_kept():
            return super()._evaluate(*args, **kwargs)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
