"""The HTTP interface, asked by OpenAI's own client on loopback."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from peftcore import LoraConfig
from peftcore.serving import Limits

SAY = [{"role": "user", "content": "Say it."}]
ADAPTERS = ("base", "sql", "chat", "dora", "ia3", "mix")


def chat_tokens(served: Any, messages: list[dict[str, str]] = SAY) -> list[int]:
    return served.world.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


# -- answers --------------------------------------------------------------------------------------------------------


def test_a_chat_is_what_generate_says_whole_or_streamed(served: Any) -> None:
    client, prompt = served.client(), chat_tokens(served)
    for name in ADAPTERS:
        expected = served.world.expected(name, prompt, 24)
        given: Any = {"model": name, "messages": SAY, "temperature": 0, "max_tokens": 24}
        whole = client.chat.completions.create(**given)
        assert whole.choices[0].message.content == expected
        assert (whole.model, whole.object, whole.choices[0].message.role) == (name, "chat.completion", "assistant")
        chunks = list(client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
        assert [chunk.choices[0].finish_reason for chunk in chunks[:-2]] == [None] * (len(chunks) - 2)
        assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
        assert chunks[-1].usage == whole.usage and len({chunk.id for chunk in chunks}) == 1
        assert whole.usage is not None and whole.usage.prompt_tokens == len(prompt)
        assert whole.usage.total_tokens == len(prompt) + whole.usage.completion_tokens


def test_a_completion_of_text_or_of_tokens(served: Any) -> None:
    client = served.client()
    tokens = served.world.tokenizer("def f(x):")["input_ids"]
    expected = served.world.expected("sql", tokens, 16)
    for prompt in ("def f(x):", tokens, ["def f(x):"]):
        found = client.completions.create(model="sql", prompt=prompt, temperature=0)
        assert found.choices[0].text == expected  # of 16 tokens, as OpenAI's are where nothing is said
    parts = list(client.completions.create(model="sql", prompt=tokens, temperature=0, stream=True))
    assert "".join(part.choices[0].text for part in parts) == expected
    assert parts[-1].choices[0].finish_reason in ("length", "stop")


@pytest.mark.slow
def test_sixteen_clients_at_once_with_different_adapters(served: Any) -> None:
    client = served.client()

    def ask(number: int) -> tuple[str, str]:
        name, prompt = ADAPTERS[number % len(ADAPTERS)], [5 + number, 9, 30]
        given: Any = {"model": name, "prompt": prompt, "temperature": 0, "max_tokens": 30}
        if number % 2:
            parts = list(client.completions.create(**given, stream=True))
            return "".join(part.choices[0].text for part in parts), served.world.expected(name, prompt, 30)
        return client.completions.create(**given).choices[0].text, served.world.expected(name, prompt, 30)

    for name in ADAPTERS:
        served.world.expected(name, [5], 1)  # made before, for no two threads are to make it
    with ThreadPoolExecutor(16) as pool:
        for found, expected in pool.map(ask, range(16)):
            assert found == expected


# -- errors ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_answered_says_why(served: Any) -> None:
    client = served.client()
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="nope", messages=SAY)  # type: ignore[arg-type]
    assert unknown.value.code == "model_not_found" and "base, chat" in str(unknown.value)
    with pytest.raises(openai.BadRequestError, match="the context length is 512 tokens") as long:
        client.completions.create(model="sql", prompt="x" * 600)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="300 tokens and the completion up to 300"):
        client.completions.create(model="sql", prompt="x" * 300, max_tokens=300)
    with pytest.raises(openai.BadRequestError, match="the prompt is empty"):
        client.completions.create(model="sql", prompt="")
    with pytest.raises(openai.BadRequestError, match="999 is not a token id; the vocabulary has 259"):
        client.completions.create(model="sql", prompt=[999])
    reply = httpx.post(f"{served.url}/v1/completions", content=b"{no json")
    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")
    assert httpx.get(f"{served.url}/v1/nothing").json()["error"]["message"] == "Not Found"


def test_a_broken_adapter_is_500_and_its_neighbours_are_answered(serving: Callable[..., Any], world: Any) -> None:
    def spoil(model: Any) -> None:
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(float("nan"))

    world.add("broken", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), 3, spoil)
    served = serving(http=True)
    client = served.client()

    def ask(name: str) -> Any:
        try:
            found = client.completions.create(model=name, prompt=[5, 6], temperature=0, max_tokens=20)
            return found.choices[0].text
        except openai.InternalServerError as error:
            return error

    with ThreadPoolExecutor(6) as pool:
        *good, bad = pool.map(ask, ["sql", "chat", "mix", "base", "broken"])
    assert good == [world.expected(name, [5, 6], 20) for name in ("sql", "chat", "mix", "base")]
    assert bad.code == "adapter_failed" and "is not finite" in str(bad)


def test_a_full_queue_is_429_and_a_late_answer_504(serving: Callable[..., Any]) -> None:
    served = serving(http=True, limits=Limits(max_batch=1, max_queue=1, timeout=2.0, max_tokens=500))
    client = served.client()
    given: Any = {"model": "base", "prompt": [5, 6], "seed": 1, "max_tokens": 500}
    served.slow_down(0.02)
    outcomes: list[Any] = []

    def ask() -> None:
        try:
            outcomes.append(client.completions.create(**given))
        except openai.APIStatusError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    threads[0].start()
    served.wait(lambda: served.metric("peftcore_running_rows") == 1)
    threads[1].start()
    served.wait(lambda: served.metric("peftcore_queue_depth") == 1 or len(served.service.engine._admission) == 1)
    with pytest.raises(openai.RateLimitError, match="the queue is full: 1 requests"):
        client.completions.create(**given)
    for thread in threads:
        thread.join()
    assert [one.status_code for one in outcomes] == [504, 504]
    assert "request timed out after 2 s" in str(outcomes[0])
    served.wait(lambda: served.service.engine.idle)
    with pytest.raises(openai.APIError, match="request timed out after 2 s"):  # in a stream it is the last event
        list(client.completions.create(**given, stream=True))
    # an answer is counted when its last byte is out, which its client may have read by then
    served.wait(lambda: served.metric("peftcore_requests_total", model="base", status="504") == 3)
    assert served.metric("peftcore_requests_total", model="base", status="429") == 1


# -- clients that go, keys, metrics ---------------------------------------------------------------------------------


def test_a_new_version_while_requests_run(served: Any, world: Any) -> None:
    new = world.add("next", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), 50)
    client, stop = served.client(), threading.Event()
    texts: list[str] = []

    def ask() -> None:
        while not stop.is_set():
            found = client.completions.create(model="sql", prompt=[5, 6], temperature=0, max_tokens=10)
            texts.append(found.choices[0].text)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    served.wait(lambda: len(texts) > 10)
    served.service.catalog.store.replace("sql", new)
    replaced = len(texts)
    served.wait(lambda: len(texts) > replaced + 10)
    stop.set()
    for thread in threads:
        thread.join()
    old, fresh = world.expected("sql", [5, 6], 10), world.expected("next", [5, 6], 10)
    assert old != fresh and set(texts) == {old, fresh}
    assert texts[0] == old and set(texts[-4:]) == {fresh}


def test_warnings_are_shown_and_the_server_stays_ready(served: Any) -> None:
    assert httpx.get(f"{served.url}/ready").json() == {"status": "ready"}
    served.service.warnings["champion"] = "v2 could not be loaded"
    answer = httpx.get(f"{served.url}/ready")
    assert answer.status_code == 200 and answer.json()["warnings"] == {"champion": "v2 could not be loaded"}
    assert served.metric("peftcore_warning", source="champion") == 1
    served.service.warnings.clear()
    assert served.metric("peftcore_warning", source="champion") == 0
