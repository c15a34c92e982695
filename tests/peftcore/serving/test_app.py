"""The HTTP interface, asked by OpenAI's own client on loopback."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import torch

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


def test_log_probabilities_are_those_of_the_model(served: Any, world: Any) -> None:
    client, prompt = served.client(), [5, 6, 7]
    found = client.completions.create(model="sql", prompt=prompt, temperature=0, max_tokens=6, logprobs=2)
    logprobs = found.choices[0].logprobs
    world.expected("sql", prompt, 1)
    alone = world.alone["sql"]
    whole_ids = alone.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6, pad_token_id=0)
    tokens = whole_ids[0, len(prompt) :].tolist()
    logits = alone(whole_ids).logits[0].log_softmax(-1)
    for place, token in enumerate(tokens):
        row = logits[len(prompt) - 1 + place]
        assert logprobs.token_logprobs[place] == pytest.approx(row[token].item(), abs=1e-5)
        assert sorted(logprobs.top_logprobs[place].values()) == pytest.approx(
            sorted(row.topk(2).values.tolist()), abs=1e-5
        )
    assert logprobs.text_offset[0] == 0 and len(logprobs.text_offset) == len(tokens)
    stop = found.choices[0].text[:2] + "\0"  # begins like the completion, whose first text therefore waits
    request: Any = {"model": "sql", "prompt": prompt, "temperature": 0, "max_tokens": 6, "logprobs": 2, "stop": stop}
    chunks = [chunk.choices[0] for chunk in client.completions.create(**request, stream=True)]
    assert [place for chunk in chunks if chunk.logprobs for place in chunk.logprobs.text_offset] == logprobs.text_offset
    given: Any = {
        "model": "sql",
        "messages": SAY,
        "temperature": 0,
        "max_tokens": 6,
        "logprobs": True,
        "top_logprobs": 1,
    }
    whole = client.chat.completions.create(**given).choices[0]
    parts = [chunk.choices[0] for chunk in client.chat.completions.create(**given, stream=True)]
    streamed = [one for part in parts if part.logprobs for one in part.logprobs.content]
    assert streamed == whole.logprobs.content and 0 < len(streamed) <= 6
    assert all(one.top_logprobs[0].logprob == pytest.approx(one.logprob) for one in streamed)  # greedy
    assert all(one.bytes is None or bytes(one.bytes).decode() == one.token for one in streamed)


def test_several_completions_have_seeds_of_their_own(served: Any) -> None:
    client = served.client()
    given: Any = {"model": "sql", "prompt": [5, 6], "max_tokens": 8, "temperature": 1.5}
    alone = [client.completions.create(**given, seed=seed).choices[0].text for seed in (3, 4, 5)]
    found = client.completions.create(**given, seed=3, n=3)
    assert [choice.text for choice in found.choices] == alone and [choice.index for choice in found.choices] == [
        0,
        1,
        2,
    ]
    assert found.usage.prompt_tokens == 2 and found.usage.completion_tokens > 8
    texts = ["", "", ""]
    for part in client.completions.create(**given, seed=3, n=3, stream=True):
        texts[part.choices[0].index] += part.choices[0].text
    assert texts == alone


def test_penalties_and_biases_change_the_answer(served: Any) -> None:
    client = served.client()
    given: Any = {"model": "sql", "prompt": [5, 6], "max_tokens": 12, "temperature": 0}
    plain = client.completions.create(**given).choices[0].text
    assert client.completions.create(**given, presence_penalty=0.0, logit_bias={}).choices[0].text == plain
    forced = client.completions.create(**given, logit_bias={"40": 100}, logprobs=0).choices[0]
    assert len(set(forced.logprobs.tokens)) == 1
    varied = client.completions.create(**given, logit_bias={"40": 20}, frequency_penalty=2, presence_penalty=2)
    assert varied.choices[0].text != forced.text


def test_adapters_are_loaded_and_unloaded_as_in_vllm(served: Any, world: Any) -> None:
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    for name, seed in (("new", 50), ("newer", 51)):
        world.add(name, config, seed)
    load, unload = (f"{served.url}/v1/{verb}_lora_adapter" for verb in ("load", "unload"))

    def post(url: str, **body: Any) -> tuple[int, str]:
        answer = httpx.post(url, json=body, timeout=60)
        return answer.status_code, answer.text

    code, text = post(load, lora_name="x", lora_path="new")
    assert code == 403 and "--load-from" in text
    object.__setattr__(served.service, "loadable", world.folder)
    client = served.client()
    assert post(load, lora_name="x", lora_path=str(world.folder / "new"))[0] == 200
    given: Any = {"model": "x", "prompt": [5, 6], "temperature": 0, "max_tokens": 9}
    assert client.completions.create(**given).choices[0].text == world.expected("new", [5, 6], 9)
    entry = next(model for model in client.models.list() if model.id == "x").model_dump()
    assert (entry["root"], entry["parent"], entry["max_model_len"]) == ("x", "base", 512)
    code, text = post(load, lora_name="x", lora_path="newer")
    assert code == 400 and "load_inplace" in text
    assert post(load, lora_name="x", lora_path="newer", load_inplace=True)[0] == 200
    assert post(load, lora_name="org/x.1", lora_path="new")[0] == 200
    named = client.completions.create(**given | {"model": "org/x.1"}).choices[0].text
    assert named == world.expected("new", [5, 6], 9) and client.models.retrieve("org/x.1").id == "org/x.1"
    assert client.completions.create(**given).choices[0].text == world.expected("newer", [5, 6], 9)
    for name, path, expected, said in (
        ("base", "new", 400, "is the base model"),
        ("y", "..", 403, "in the folder that the server allows"),
        ("y", "/etc", 403, "in the folder that the server allows"),
        ("y", "gone", 400, "no directory"),
        ("y", ".", 400, "cannot be loaded"),
        ("y", "a\0b", 400, "cannot be a path"),
        ("y", "a" * 5000, 400, "cannot be a path"),
    ):
        code, text = post(load, lora_name=name, lora_path=path)
        assert code == expected and said in text, (name, path, text)
    assert post(unload, lora_name="x")[0] == 200 and post(unload, lora_name="x")[0] == 404
    assert "x" not in [model.id for model in client.models.list()]


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
    assert "send the header Content-Type: application/json" in reply.json()["error"]["message"]
    assert httpx.get(f"{served.url}/v1/nothing").json()["error"]["message"] == "Not Found"
    assert httpx.get(f"{served.url}/v1/completions").headers["allow"] == "POST"


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


@pytest.mark.slow
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
