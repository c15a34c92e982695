"""Work in a thread that ends with it."""

import threading

import pytest

from peftcore.serving import in_own_thread


def test_the_result_comes_from_a_thread_that_has_ended() -> None:
    thread = in_own_thread(threading.current_thread).result(timeout=30)
    assert thread is not threading.current_thread() and thread.daemon
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_an_error_is_raised_where_the_result_is_read() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        in_own_thread(int, "seven").result(timeout=30)


def test_a_cancelled_future_is_no_error() -> None:
    started, go_on = threading.Event(), threading.Event()

    def work() -> str:
        started.set()
        assert go_on.wait(30)
        return "done"

    future = in_own_thread(work)
    assert started.wait(30) and not future.cancel()  # it runs
    go_on.set()
    assert future.result(timeout=30) == "done"
