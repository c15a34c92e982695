"""Requests wait for a row and for their adapters."""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from peftcore.composition import Weighted
from peftcore.serving import Limits, admission
from peftcore.serving.admission import MAX_RETRY
from peftcore.serving.errors import NoRoomError, QueueFullError, ServingError


def test_an_adapter_that_loads_slowly_holds_up_nobody(serving: Callable[..., Any]) -> None:
    served = serving()
    store, gate = served.service.catalog.store, threading.Event()
    store.register("slow", lambda: gate.wait(20) and served.world.folder / "sql")
    assert len(served.begin("sql", [5], 2).result()) == 3  # the very first adapter is waited for
    slow = served.begin("slow", [5, 6], 5)
    assert served.begin("sql", [5, 6], 5).result()[0] == served.world.expected("sql", [5, 6], 5)
    assert served.begin("base", [5, 6], 5).result()[0] == served.world.expected("base", [5, 6], 5)
    assert slow.events.empty()
    gate.set()
    assert slow.result()[0] == served.world.expected("sql", [5, 6], 5)


def test_more_adapters_than_the_model_holds_take_turns(serving: Callable[..., Any]) -> None:
    served = serving(max_loaded=2)
    names = ["sql", "chat", "dora", "ia3", "mix"] * 3
    asked = [served.begin(name, [7, n + 3], 10) for n, name in enumerate(names)]
    for n, (name, one) in enumerate(zip(names, asked, strict=True)):
        assert one.result()[0] == served.world.expected(name, [7, n + 3], 10)
    assert served.service.catalog.store.statistics()["evictions"] > 0


def test_a_composition_that_never_fits_is_refused(serving: Callable[..., Any]) -> None:
    served = serving(max_loaded=1)
    assert isinstance(served.begin("mix", [5], 3).result(), NoRoomError)
    assert served.begin("sql", [5], 3).result()[0] == served.world.expected("sql", [5], 3)


def test_two_compositions_that_fit_only_one_after_the_other_are_both_answered(
    serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each holds one of the two places when it asks for its second adapter, until both have been refused."""
    served, running = serving(max_loaded=2), list[bool]()
    catalog, both = served.service.catalog, threading.Barrier(2)
    original, meets = catalog.store.acquire, {"chat", "dora", "sql", "ia3"}

    def acquire(name: str) -> Any:
        try:
            return original(name)
        finally:  # also after the refusal of the second one
            if running and name in meets:
                meets.remove(name)
                both.wait(20)

    monkeypatch.setattr(catalog.store, "acquire", acquire)
    catalog.compositions.update(ab=Weighted({"chat": 0.5, "sql": 0.5}), cd=Weighted({"dora": 0.5, "ia3": 0.5}))
    assert len(served.begin("sql", [5], 1).result()) == 3  # the very first adapter is waited for
    running.append(True)
    asked = [served.begin(name, [5, 6], 3) for name in ("ab", "cd")]
    results = [one.result() for one in asked]
    assert not [one for one in results if isinstance(one, ServingError)]
    served.wait(lambda: served.service.engine.idle)
    assert catalog.store.statistics()["in_use"] == 0


def test_a_request_is_always_counted_between_the_queue_and_its_row(
    serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serving()
    engine = served.service.engine
    take, idle = engine._admission.take, []
    monkeypatch.setattr(engine._admission, "take", lambda generations: (take(generations), idle.append(engine.idle)))
    assert served.begin("sql", [5, 6, 7], 3).result()[0] == served.world.expected("sql", [5, 6, 7], 3)
    assert idle == [False]


def test_a_request_is_counted_while_its_adapters_load(
    serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two of the queue's lists a request is in none of them, and is counted all the same."""
    served = serving()
    engine, counts = served.service.engine, []
    load, settle = admission.in_own_thread, engine._admission._settle

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: (counts.append((len(engine._admission), engine.idle)), function(*args))[1]

    monkeypatch.setattr(admission, "in_own_thread", counted(load))
    monkeypatch.setattr(engine._admission, "_settle", counted(settle))
    assert served.begin("sql", [5, 6, 7], 3).result()[0] == served.world.expected("sql", [5, 6, 7], 3)
    assert counts == [(1, False)] * 2
    assert isinstance(served.begin("unknown", [5], 3).result(), ServingError)
    served.wait(lambda: engine.idle)


def test_the_engine_is_not_idle_while_a_request_moves_on(
    serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`idle` sees a request that gets its row while another thread reads the property."""
    engine = serving().service.engine
    engine.stop()

    class Moves:
        def __len__(self) -> int:
            engine._prefill = object()  # the last request leaves the queue now
            return 0

    monkeypatch.setattr(engine, "_admission", Moves())
    assert not engine.idle


def test_the_next_row_goes_to_the_model_with_the_fewest_requests_in_progress(serving: Callable[..., Any]) -> None:
    served = serving(limits=Limits(max_batch=2))
    served.slow_down(0.003)
    flood = [served.begin("sql", [5, n], 8) for n in range(3, 13)]
    flood[0].first()
    late = [served.begin(name, [5, 6], 8) for name in ("chat", "base")]
    for one in late:
        assert len(one.result()) == 3
    finished = [one.generation.finished for one in flood]
    assert sum(finished) < len(flood) - 2, "the flood was not served first"
    assert all(len(one.result()) == 3 for one in flood)


def test_a_full_queue_takes_a_model_with_few_requests_in_place_of_the_newest_of_the_one_with_most(
    serving: Callable[..., Any],
) -> None:
    served = serving(limits=Limits(max_batch=1, max_queue=3))
    running = served.begin("base", [5, 6, 7], 400)
    running.first()
    flood = [served.begin("sql", [5, n], 2) for n in (3, 4, 5)]
    other = served.begin("chat", [5, 6], 2)
    refused = flood[2].result()
    assert isinstance(refused, QueueFullError) and refused.retry_after >= 1
    with pytest.raises(QueueFullError):
        served.begin("chat", [5, 7], 2)  # sql has two and chat one, so chat would have as many
    served.service.engine.cancel(running.generation)
    assert [len(one.result()) for one in (flood[0], flood[1], other)] == [3, 3, 3]
    served.wait(lambda: served.service.engine.idle)


def test_a_refused_client_is_told_when_to_try_again(serving: Callable[..., Any]) -> None:
    """With 6 waiting requests, and 3 that have left the queue in the last 3 s, the queue takes 6 s."""
    served = serving(limits=Limits(max_queue=6))
    requests = served.service.engine._admission
    assert requests._seconds_until_moved() == 1
    served.service.engine.stop()
    requests._waiting["sql"] = deque(range(6))
    requests._left.extend(time.monotonic() - seconds for seconds in (3, 2, 1))
    assert requests._seconds_until_moved() in (6, 7)
    requests._left[0] -= 1e6
    assert requests._seconds_until_moved() == MAX_RETRY
    requests._waiting.clear()


def test_a_full_queue_refuses_and_a_cancelled_request_makes_room(
    serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serving(limits=Limits(max_batch=1, max_queue=2))
    running = served.begin("base", [5, 6, 7], 400)
    running.first()
    waiting = [served.begin("sql", [5], 2) for _ in range(2)]
    with pytest.raises(QueueFullError, match="the queue is full: 2 requests"):
        served.begin("sql", [5], 2)
    served.service.engine.cancel(running.generation)
    assert [len(one.result()) for one in waiting] == [3, 3]
    served.wait(lambda: served.service.engine.idle)
