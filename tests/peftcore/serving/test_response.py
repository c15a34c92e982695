"""The response to one request: whole or as server-sent events, until its deadline or until its client leaves."""

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import Request

from peftcore.serving.errors import AdapterFailedError, ServingError, TimedOutError
from peftcore.serving.generation import Chunk, Event
from peftcore.serving.protocol import ChatRequest, CompletionRequest, GenerationRequest
from peftcore.serving.response import ClientGoneError, PendingResponse, unless_disconnected
from peftcore.serving.tool_call_stream import ToolCallStream
from peftcore.serving.tool_formats import HERMES

HELLO = [Chunk("He", 1), Chunk("", 2), Chunk("llo", 3), Chunk("!", 4, "length")]
FAILED = AdapterFailedError("the adapter broke")


def responding(events: list[Event], seconds: float = 60.0) -> PendingResponse:
    """A response that gets its events from another thread, as from the engine."""

    def start(index: int, sink: Callable[[Event], None]) -> Any:
        thread = threading.Thread(target=lambda: [sink(event) for event in events])
        thread.start()
        thread.join()
        return SimpleNamespace(prompt=[5, 6, 7])

    return PendingResponse(start, seconds)


def completion(**options: Any) -> CompletionRequest:
    return CompletionRequest(model="sql", prompt="x", **options)


def chat(**options: Any) -> ChatRequest:
    return ChatRequest(model="sql", messages=[{"role": "user", "content": "x"}], **options)  # type: ignore[list-item]


def events_of(events: list[Event], body: GenerationRequest) -> list[Any]:
    """The server-sent events of a streamed response, read as JSON; the last one may be "[DONE]"."""

    async def run() -> list[str]:
        response = responding(events)
        return [sent async for sent in response.stream(body, None, await response.next())]

    sent = asyncio.run(run())
    assert all(one.startswith("data: ") and one.endswith("\n\n") and one.count("\n") == 2 for one in sent)
    data = [one.removeprefix("data: ").strip() for one in sent]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


def test_a_whole_response_joins_the_chunks_and_counts_tokens() -> None:
    async def run(body: GenerationRequest) -> dict[str, Any]:
        return await responding(list(HELLO)).complete(body, None)

    whole = asyncio.run(run(completion()))
    assert whole["object"] == "text_completion" and whole["model"] == "sql"
    assert whole["choices"] == [{"index": 0, "text": "Hello!", "logprobs": None, "finish_reason": "length"}]
    assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    message = asyncio.run(run(chat()))["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "Hello!"}


def test_a_streamed_chat_begins_with_the_role_and_ends_with_done() -> None:
    *sent, done = events_of(list(HELLO), chat(stream=True))
    assert done == "[DONE]" and len({one["id"] for one in sent}) == 1
    choices = [one["choices"][0] for one in sent]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""},
        {"content": "He"},
        {"content": "llo"},
        {"content": "!"},
        {},
    ]
    assert [choice["finish_reason"] for choice in choices] == [None] * 4 + ["length"]
    assert not any("usage" in one for one in sent)


def test_a_stream_counts_tokens_in_one_more_event_if_that_is_asked_for() -> None:
    body = completion(stream=True, stream_options={"include_usage": True})
    *sent, last, done = events_of([Chunk("é", 1, "stop")], body)
    assert done == "[DONE]" and last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
    assert [one["usage"] for one in sent] == [None] * 3
    assert [one["choices"][0]["text"] for one in sent] == ["", "é", ""]


def test_an_error_in_a_stream_is_its_last_event() -> None:
    sent = events_of([Chunk("He", 1), FAILED], completion(stream=True))
    assert sent[-1] == FAILED.body() and sent[-2]["choices"][0]["text"] == "He"


def test_an_error_ends_a_whole_response() -> None:
    async def run() -> ServingError | None:
        response = responding([Chunk("He", 1), FAILED])
        with pytest.raises(AdapterFailedError, match="the adapter broke"):
            await response.complete(completion(), None)
        return response.error

    assert asyncio.run(run()) is FAILED


def test_a_deadline_that_has_passed_is_an_error() -> None:
    async def run() -> None:
        response = responding([], seconds=0.0)
        with pytest.raises(TimedOutError, match="request timed out after 0 s"):
            await response.next()
        assert isinstance(response.error, TimedOutError)

    asyncio.run(run())


# -- clients that leave -----------------------------------------------------------------------------------------------


def request_of(*messages: dict[str, Any]) -> Request:
    """A request whose client sends these messages, and then stays connected."""
    waiting = list(messages)

    async def receive() -> dict[str, Any]:
        if not waiting:
            await asyncio.Event().wait()
        return waiting.pop(0)

    return Request({"type": "http"}, receive)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine, and check that no other task is left afterwards."""

    async def alone() -> Any:
        result = await asyncio.gather(coroutine, return_exceptions=True)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return result[0]

    return asyncio.run(alone())


def test_the_result_of_a_client_that_stays_is_returned() -> None:
    async def answer() -> str:
        return "text"

    assert run(unless_disconnected(request_of({"type": "http.request"}), answer())) == "text"


def test_an_error_of_the_answer_is_raised() -> None:
    async def answer() -> str:
        raise FAILED

    assert run(unless_disconnected(request_of(), answer())) is FAILED


def test_a_client_that_leaves_cancels_its_answer() -> None:
    cancelled = []

    async def answer() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return "text"

    request = request_of({"type": "http.request"}, {"type": "http.disconnect"})
    assert isinstance(run(unless_disconnected(request, answer())), ClientGoneError)
    assert cancelled == [True]


# -- tool calls -----------------------------------------------------------------------------------------------------

CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


def answering(events: list[Event], is_parallel: bool) -> tuple[PendingResponse, Any]:
    """A response whose text may call the function add, and its generation."""
    generation = SimpleNamespace(prompt=[5, 6, 7], abandoned=False)

    def start(index: int, sink: Callable[[Event], None]) -> Any:
        for event in events:
            sink(event)
        return generation

    return PendingResponse(start, 60.0, calls=lambda: ToolCallStream(HERMES, {"add"}, is_parallel)), generation


@pytest.mark.parametrize(
    ("events", "finish", "content", "arguments"),
    [
        ([Chunk("Well. " + CALL, 1), Chunk("", 2, "stop")], "tool_calls", "Well.", ['{"a": 1}']),
        ([Chunk(CALL, 1), Chunk(CALL, 2, "stop")], "tool_calls", None, ['{"a": 1}'] * 2),
        ([Chunk(CALL[:45], 1), Chunk(CALL[45:47], 2, "length")], "length", None, ['{"a": 1']),
        ([Chunk("<tool_call>add(1)", 1, "stop")], "stop", "<tool_call>add(1)", []),
        ([Chunk("No.", 1, "length")], "length", "No.", []),
    ],
)
def test_a_whole_response_has_calls_apart_from_content(
    events: list[Event], finish: str, content: str | None, arguments: list[str]
) -> None:
    async def run() -> tuple[dict[str, Any], int]:
        response, _ = answering(events, True)
        return await response.complete(chat(), None), response.tool_calls

    whole, count = asyncio.run(run())
    choice = whole["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == (finish, content)
    assert [one["function"]["arguments"] for one in choice["message"].get("tool_calls", [])] == arguments
    assert count == len(arguments)


def test_without_parallel_calls_the_row_ends_after_the_first_call() -> None:
    events: list[Event] = [Chunk(CALL, 7), Chunk(CALL, 8), Chunk("", 9, "stop")]

    async def whole() -> tuple[dict[str, Any], bool]:
        response, generation = answering(events, False)
        return await response.complete(chat(), None), generation.abandoned

    async def streamed() -> list[Any]:
        response, _ = answering(events, False)
        body = chat(stream=True)
        sent = [one async for one in response.stream(body, None, await response.next())]
        return [json.loads(one.removeprefix("data: ")) for one in sent[:-1]]

    found, abandoned = asyncio.run(whole())
    assert abandoned and found["choices"][0]["finish_reason"] == "tool_calls"
    assert len(found["choices"][0]["message"]["tool_calls"]) == 1
    assert found["usage"]["completion_tokens"] == 7
    choices = [one["choices"][0] for one in asyncio.run(streamed())]
    assert [list(choice["delta"]) for choice in choices] == [["role", "content"], ["tool_calls"], ["tool_calls"], []]
    assert choices[-1]["finish_reason"] == "tool_calls"
