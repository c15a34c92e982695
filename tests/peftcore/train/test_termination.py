import os
import signal
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peftcore.train.termination import SignalListener

ALONE: Any = SimpleNamespace(num_processes=1)


def test_a_signal_is_noted_inside_and_does_what_it_did_outside() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    try:
        with pytest.raises(SystemExit) as ended, SignalListener([signal.SIGUSR1]) as termination:
            assert not termination.received(ALONE)
            for _ in range(2):  # schedulers send it more than once
                os.kill(os.getpid(), signal.SIGUSR1)
            assert termination.received(ALONE) and termination.name == "SIGUSR1"
            raise SystemExit(termination.exit_status)
        assert ended.value.code == 128 + signal.SIGUSR1 and seen == []
        os.kill(os.getpid(), signal.SIGUSR1)
        assert seen == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_signal_that_came_too_late_is_raised_again_unless_an_error_ends_it_anyway() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    try:
        with pytest.raises(KeyError), SignalListener([signal.SIGUSR1]):
            os.kill(os.getpid(), signal.SIGUSR1)
            raise KeyError
        assert seen == []
        with SignalListener([signal.SIGUSR1]):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert seen == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_in_another_thread_and_for_no_signals_nothing_changes() -> None:
    def handlers(signals: list[signal.Signals]) -> Any:
        with SignalListener(signals):
            return signal.getsignal(signal.SIGTERM)

    before, found = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: found.append(handlers([signal.SIGTERM])))
    thread.start()
    thread.join()
    assert [*found, handlers([])] == [before, before]
    assert handlers([signal.SIGTERM]) != before == signal.getsignal(signal.SIGTERM)


def test_all_processes_end_when_one_is_told_to() -> None:
    def gather(own: torch.Tensor) -> torch.Tensor:
        return torch.cat([own, torch.tensor([int(signal.SIGTERM)])])

    accelerator: Any = SimpleNamespace(num_processes=2, device="cpu", gather=gather)
    with pytest.raises(SystemExit), SignalListener([signal.SIGTERM]) as termination:
        assert termination.number is None and termination.received(accelerator)
        raise SystemExit(termination.exit_status)
    assert termination.exit_status == 143
    assert not SignalListener([]).received(accelerator)  # turned off, it costs no communication
