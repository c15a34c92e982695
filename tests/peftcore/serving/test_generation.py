"""One request: its events add up to its text, its last event says why it ended, and its adapters are released first."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from peftcore.serving.errors import AdapterFailedError
from peftcore.serving.generation import Chunk, Generation
from peftcore.serving.sampling import Sampling

EOS = 2


class Lease:
    """Counts how often it is released."""

    version = "sql-v2"

    def __init__(self) -> None:
        self.released = 0

    def release(self) -> None:
        self.released += 1


@pytest.fixture
def generation(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Make a generation with a lease; its events are in `events`, each with the releases so far."""

    def make(max_tokens: int = 50, stop: tuple[str, ...] = ()) -> Any:
        events: list[tuple[Any, int]] = []
        lease: Any = Lease()
        made: Any = Generation(
            "sql",
            (5, 6),
            Sampling(max_tokens, stop=stop),
            tokenizer,
            frozenset({EOS}),
            lambda event: events.append((event, lease.released)),
        )
        made.lease, made.events, made.given_lease = lease, events, lease
        return made

    return make


def pushed(one: Any, tokens: list[int]) -> list[Chunk]:
    for token in tokens:
        if not one.finished:
            one.push(token)
    return [event for event, _ in one.events]


def test_a_request_ends_at_its_most_tokens_with_all_its_text(
    generation: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokens = tokenizer("Grüße, 世界!")["input_ids"]
    one = generation(len(tokens))
    events = pushed(one, [*tokens, 40])
    assert "".join(event.text for event in events) == "Grüße, 世界!"
    assert [event.tokens for event in events] == list(range(1, len(tokens) + 1))
    assert [event.finish for event in events] == [None] * (len(tokens) - 1) + ["length"]
    assert one.last == tokens[-1] and one.tokens == len(tokens)


def test_an_end_token_is_counted_and_is_no_part_of_the_text(
    generation: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    events = pushed(generation(), [*tokenizer("ok")["input_ids"], EOS])
    assert "".join(event.text for event in events) == "ok"
    assert (events[-1].finish, events[-1].tokens) == ("stop", 3)


def test_text_that_began_like_a_stop_text_comes_with_the_last_event(
    generation: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokens = tokenizer("xaab")["input_ids"]
    for last, finish in (([EOS], "stop"), ([], "length")):
        events = pushed(generation(len(tokens) + len(last), ("aabaac",)), [*tokens, *last])
        assert [event.text for event in events[:4]][:3] == ["x", "", ""]
        assert "".join(event.text for event in events) == "xaab" and events[-1].finish == finish


def test_a_stop_text_ends_the_request_without_it(generation: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    events = pushed(generation(stop=("\n\n",)), tokenizer("SELECT 1;\n\nmore")["input_ids"])
    assert "".join(event.text for event in events) == "SELECT 1;" and events[-1].finish == "stop"


def test_the_adapters_are_released_before_the_last_event_and_only_once(generation: Any) -> None:
    one = generation(2)
    pushed(one, [40, 41])
    one.release()
    assert [released for _, released in one.events] == [0, 1]
    assert one.version == "sql-v2", "what computed the answer is known after the release"
    assert one.given_lease.released == 1 and one.lease is None


def test_after_an_error_nothing_more_is_sent(generation: Any) -> None:
    one = generation()
    error = AdapterFailedError("broken")
    one.fail(error)
    one.push(40)
    one.fail(AdapterFailedError("again"))
    assert one.events == [(error, 1)] and one.finished


def test_a_client_whose_event_loop_is_closed_is_given_up(tokenizer: PreTrainedTokenizerBase) -> None:
    def closed(_: Any) -> None:
        raise RuntimeError("Event loop is closed")

    one = Generation("base", (5,), Sampling(9), tokenizer, frozenset({EOS}), closed)
    one.push(40)
    assert one.abandoned and not one.finished
