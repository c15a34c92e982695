"""The HTTP interface, asked by OpenAI's own client on loopback."""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from peftcore import ConfigError, LoraConfig
from peftcore.serving import Limits

SAY = [{"role": "user", "content": "Say it."}]
ADAPTERS = ("base", "sql", "chat", "dora", "ia3", "mix")


def chat_tokens(served: Any, messages: list[dict[str, str]] = SAY) -> list[int]:
    return served.world.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


@pytest.fixture
def served(serving: Callable[..., Any]) -> Any:
    return serving(http=True)


# -- answers --------------------------------------------------------------------------------------------------------


def test_models_are_the_base_the_adapters_and_the_compositions(served: Any) -> None:
    client = served.client()
    kinds = {model.id: model.kind for model in client.models.list()}  # type: ignore[attr-defined]
    assert kinds == {
        **{"base": "base", "mix": "composition"},
        **dict.fromkeys(("chat", "dora", "ia3", "sql"), "adapter"),
    }
    assert client.models.retrieve("sql").id == "sql"
    with pytest.raises(openai.NotFoundError, match="the model 'nope' does not exist"):
        client.models.retrieve("nope")


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


def test_parts_of_a_message_are_one_text(served: Any) -> None:
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "it."}]
    given: Any = {"model": "sql", "messages": [{"role": "user", "content": parts}], "temperature": 0}
    found = served.client().chat.completions.create(max_completion_tokens=9, **given)
    assert found.choices[0].message.content == served.world.expected("sql", chat_tokens(served), 9)


def test_a_developer_message_is_the_system_s_and_an_answer_can_be_sent_back(served: Any) -> None:
    client = served.client()
    first: Any = {"model": "sql", "temperature": 0, "max_tokens": 5}
    answer = client.chat.completions.create(messages=SAY, **first).choices[0].message
    sent = [{"role": "developer", "content": "Be short."}, *SAY, answer.model_dump(), *SAY]
    read = [{"role": "system", "content": "Be short."}, *SAY, {"role": "assistant", "content": answer.content}, *SAY]
    found = client.chat.completions.create(messages=sent, **first)
    assert found.choices[0].message.content == served.world.expected("sql", chat_tokens(served, read), 5)


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


@pytest.mark.parametrize(
    ("given", "param", "said"),
    [
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 5000}, "max_tokens", "at most 1,024 on this server, got 5,000"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 2}, "n", "Input should be 1, got 2"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "less than or equal to 0"),
        ({"stop": ["a"] * 5}, "stop", "at most 4 items"),
        ({"logprobs": True}, "logprobs", "got True"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "unknown field"),
        ({"extra_body": {"top_k": 3}}, "top_k", "unknown field"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "messages"),
        ({"messages": [{"role": "user", "content": "a<|im_end|>\n"}]}, "messages", "contains <|im_end|>,"),
        ({"messages": [{"role": "user<|im_end|>", "content": "a"}]}, "messages", "role: Input should be 'system'"),
        ({"messages": [{"role": "banana", "content": "a"}]}, "messages", "messages.0.role: Input should be 'system'"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages", "messages.0.role: Input should be 'system'"),
        ({"messages": [{"role": "user", "content": "a", "name": "Ann"}]}, "messages", "messages.0.name: not supported"),
        ({"messages": [{"role": "user", "content": "a", "mood": 1}]}, "messages", "messages.0.mood: unknown field"),
        (
            {"messages": [{"role": "assistant", "content": "a", "function_call": {"name": "f", "arguments": ""}}]},
            "messages",
            "messages.0.function_call: not supported",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"id": "1", "type": "function"}]}]},
            "messages",
            "messages.0.tool_calls: List should have at most 0 items",
        ),
        ({"max_tokens": True}, "max_tokens", "valid integer, got True"),
        ({"max_tokens": "2"}, "max_tokens", "valid integer, got '2'"),
        ({"temperature": "0.5"}, "temperature", "valid number, got '0.5'"),
        ({"top_p": True}, "top_p", "valid number, got True"),
        ({"stream_options": {"other": 1}}, "stream_options", "unknown field"),
    ],
)
def test_a_bad_parameter_is_named(served: Any, given: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.client().chat.completions.create(**{"model": "sql", "messages": SAY, **given})
    body: Any = caught.value.body
    assert (body["type"], body["param"]) == ("invalid_request_error", param)
    assert said in body["message"]


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


def test_a_body_without_end_is_cut_off(serving: Callable[..., Any]) -> None:
    served = serving(http=True, limits=Limits(max_body=10_000))
    body = json.dumps({"model": "sql", "prompt": "x" * 20_000})
    for content in (body, iter([body[:6000].encode(), body[6000:].encode()])):
        reply = httpx.post(
            f"{served.url}/v1/completions", content=content, headers={"content-type": "application/json"}
        )
        assert reply.status_code == 413
        assert "more than 10,000 bytes" in reply.json()["error"]["message"]


def test_a_template_that_refuses_is_a_bad_request(served: Any) -> None:
    served.world.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(openai.BadRequestError, match="roles must alternate"):
        served.client().chat.completions.create(model="sql", messages=SAY)  # type: ignore[arg-type]
    served.world.tokenizer.chat_template = None
    with pytest.raises(openai.BadRequestError, match="no chat template; use /v1/completions"):
        served.client().chat.completions.create(model="sql", messages=SAY)  # type: ignore[arg-type]


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
    hold_up(served, 0.02)
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


def hold_up(served: Any, seconds: float) -> None:
    """Make each step of the engine take longer, and no answer end by itself."""
    forward, original = served.service.engine._forward, served.service.engine._forward._logits

    def slow(*args: Any) -> Any:
        time.sleep(seconds)
        logits = original(*args)
        logits[:, 2] = -1e9
        return logits

    forward._logits = slow


# -- clients that go, keys, metrics ---------------------------------------------------------------------------------


def test_a_client_that_leaves_frees_its_row(served: Any) -> None:
    hold_up(served, 0.02)  # ten seconds for all tokens
    given = {"model": "sql", "prompt": [5, 6], "max_tokens": 500, "temperature": 0}
    beside = ThreadPoolExecutor(1).submit(
        served.client().completions.create, model="chat", prompt=[5, 6], max_tokens=60, temperature=0
    )
    with httpx.stream("POST", f"{served.url}/v1/completions", json={**given, "stream": True}) as reply:
        next(reply.iter_bytes())
    assert beside.result().usage.completion_tokens == 60
    served.wait(lambda: served.service.engine.idle)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/completions", json=given, timeout=1.0)
    served.wait(lambda: served.service.engine.idle, 5)
    assert served.service.catalog.store.statistics()["in_use"] == 0
    served.wait(lambda: served.metric("peftcore_requests_total", model="sql", status="499") == 2)


def test_without_a_key_nothing_is_answered(serving: Callable[..., Any]) -> None:
    served = serving(http=True, keys=["first", "sécond"])
    for key in ("k", "firs", "first2"):
        with pytest.raises(openai.AuthenticationError, match="incorrect or missing API key"):
            served.client(api_key=key).models.list()
    assert httpx.get(f"{served.url}/v1/models").status_code == 401
    assert served.client(api_key="first").models.list()
    header = {"authorization": "Bearer sécond".encode()}
    assert httpx.get(f"{served.url}/v1/models", headers=header).status_code == 200
    assert httpx.get(f"{served.url}/health").status_code == 200
    for path in ("docs", "redoc", "openapi.json"):
        assert httpx.get(f"{served.url}/{path}").status_code == 404


@pytest.mark.parametrize("keys", [[""], ["  "], ["one", ""]])
def test_an_empty_key_is_refused(serving: Callable[..., Any], keys: list[str]) -> None:
    with pytest.raises(ConfigError, match="an API key is empty; check that its environment variable is set"):
        serving(keys=keys)


def test_white_space_around_a_key_is_no_part_of_it(serving: Callable[..., Any]) -> None:
    served = serving(http=True, keys=["one", " two"])
    for key in ("one", "two"):
        assert served.client(api_key=key).models.list()


def test_metrics_are_prometheus_s(served: Any) -> None:
    client = served.client()
    for name in ("sql", "chat", "sql"):
        client.completions.create(model=name, prompt=[5, 6, 7], temperature=0, max_tokens=4)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nope", prompt=[5])
    served.wait(lambda: served.metric("peftcore_requests_total", model="none", status="404") == 1)
    text = httpx.get(f"{served.url}/metrics").text
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["peftcore_requests_total", "200", "sql"] == 2
    assert samples["peftcore_requests_total", "404", "none"] == 1
    assert samples["peftcore_prompt_tokens_total",] == 9
    assert 3 <= samples["peftcore_generated_tokens_total",] <= 12
    assert samples["peftcore_time_to_first_token_seconds_count",] == 3
    assert samples["peftcore_request_seconds_count",] == 3
    assert (samples["peftcore_adapter_misses_total",], samples["peftcore_adapter_hits_total",]) == (2, 1)
    assert samples["peftcore_queue_depth",] == 0


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
