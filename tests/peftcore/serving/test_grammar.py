"""The cache of compiled grammars: bounded in size and time, and no request waits for another one's grammar."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from peftcore.serving.errors import BadRequestError, GrammarError, QueueFullError
from peftcore.serving.grammar import Compile, GrammarCache, GrammarSpec
from peftcore.serving.limits import Limits
from peftcore.serving.metrics import Metrics


class Nothing:
    """A store without adapters."""

    def statistics(self) -> dict[str, int]:
        return dict.fromkeys(("hits", "misses", "evictions", "failures", "loaded", "bytes"), 0)


def spec(text: str) -> GrammarSpec:
    return GrammarSpec("regex", text, "guided_regex")


def with_cache(
    compile_one: Callable[[GrammarSpec], Any], work: Callable[[GrammarCache], Coroutine[Any, Any, None]], **limits: Any
) -> Metrics:
    """Run something with a cache; return its metrics."""
    metrics = Metrics(Nothing(), {})  # type: ignore[arg-type]

    async def run() -> None:
        await work(GrammarCache(lambda: compile_one, Limits(**limits), metrics))

    asyncio.run(run())
    return metrics


def count(metrics: Metrics, result: str) -> float:
    return metrics._registry.get_sample_value("peftcore_grammars_total", {"kind": "regex", "result": result}) or 0.0


def test_a_grammar_is_compiled_once_even_for_requests_at_the_same_time() -> None:
    compiled: list[str] = []

    def compile_one(one: GrammarSpec) -> Any:
        time.sleep(0.05)
        compiled.append(one.text)
        return f"grammar {one.text}"

    async def work(cache: GrammarCache) -> None:
        found = await asyncio.gather(*(cache.compile(spec("a")) for _ in range(5)), cache.compile(spec("b")))
        assert found == ["grammar a"] * 5 + ["grammar b"]
        assert await cache.compile(spec("a")) == "grammar a"

    metrics = with_cache(compile_one, work)
    assert sorted(compiled) == ["a", "b"]
    assert (count(metrics, "compiled") + count(metrics, "cached"), count(metrics, "refused")) == (7, 0)


def test_the_least_recently_used_grammar_is_compiled_again() -> None:
    compiled: list[str] = []

    async def work(cache: GrammarCache) -> None:
        for text in "abacab":
            await cache.compile(spec(text))

    with_cache(lambda one: compiled.append(one.text), work, grammar_cache=2)
    assert compiled == ["a", "b", "c", "b"]


def test_a_refused_grammar_is_refused_again_without_work() -> None:
    compiled: list[str] = []

    def compile_one(one: GrammarSpec) -> Any:
        compiled.append(one.text)
        raise GrammarError("no such thing")

    async def work(cache: GrammarCache) -> None:
        for _ in range(3):
            with pytest.raises(GrammarError, match="no such thing"):
                await cache.compile(spec("a"))

    assert count(with_cache(compile_one, work), "refused") == 3
    assert compiled == ["a"]


def test_a_grammar_that_is_too_large_is_not_compiled() -> None:
    async def work(cache: GrammarCache) -> None:
        with pytest.raises(GrammarError, match="guided_regex: the grammar has 20 bytes; this server takes at most 10"):
            await cache.compile(spec("ä" * 10))
        with pytest.raises(GrammarError, match="the grammar has 12 bytes"):
            await cache.compile(spec("\ud800" * 4))  # half of a character, as JSON can have it

    with_cache(lambda one: pytest.fail("compiled"), work, max_grammar=10)


def test_a_grammar_that_takes_too_long_delays_no_other_one() -> None:
    """Two slow ones occupy all threads of compiling; the event loop goes on, and compiled grammars are there."""
    release = threading.Event()

    def compile_one(one: GrammarSpec) -> str:
        if one.text.startswith("slow"):
            release.wait(30)
        return one.text

    async def work(cache: GrammarCache) -> None:
        assert await cache.compile(spec("quick")) == "quick"
        slow = [asyncio.create_task(cache.compile(spec(f"slow {n}"))) for n in range(2)]
        await asyncio.sleep(0.01)
        assert await cache.compile(spec("quick")) == "quick"
        with pytest.raises(QueueFullError, match="compiling grammars of other requests; try again"):
            await cache.compile(spec("new"))
        for one in slow:
            with pytest.raises(GrammarError, match=r"takes more than 0\.3 s; simplify it"):
                await one
        release.set()
        await asyncio.sleep(0.05)
        assert await cache.compile(spec("new")) == "new"
        assert await cache.compile(spec("slow 0")) == "slow 0"

    with_cache(compile_one, work, grammar_seconds=0.3)


def test_an_error_of_the_library_is_the_request_s() -> None:
    async def work(cache: GrammarCache) -> None:
        with pytest.raises(BadRequestError, match="guided_regex: the grammar cannot be compiled: ZeroDivisionError"):
            await cache.compile(spec("a"))

    with_cache(lambda one: 1 / 0, work)


def test_a_library_that_cannot_be_loaded_is_tried_again() -> None:
    tries: list[int] = []

    def load() -> Compile:
        tries.append(1)
        if len(tries) < 2:
            raise BadRequestError("not installed")
        return lambda one: one.text  # type: ignore[return-value]

    async def work() -> None:
        cache = GrammarCache(load, Limits(), Metrics(Nothing(), {}))  # type: ignore[arg-type]
        with pytest.raises(BadRequestError, match="not installed"):
            await cache.compile(spec("a"))
        assert [await cache.compile(spec("a")) for _ in range(2)] == ["a", "a"]

    asyncio.run(work())
    assert len(tries) == 2
