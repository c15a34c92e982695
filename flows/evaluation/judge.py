"""A judge's verdicts on pairs of answers: each pair in both orders, with a cache.

A judge is asked which of two answers is better. It sees them once with the candidate's answer first, and once with the
champion's answer first, because judges prefer a position (Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and
Chatbot Arena", arXiv:2306.05685). Equal answers are not asked about.

A readable reply is kept in the cache by the digest of judge, prompt and answers. So a second comparison of the same
answers asks nothing, and gives the same verdicts. An unreadable reply is not kept.
"""

import hashlib
import inspect
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from flows.errors import StageError
from flows.evaluation.scorers.load import load_function
from flows.params import Judge
from flows.params.judge import TEMPLATE, check_template, fill_template
from flows.runtime.progress import progress
from peftcore.files import write_atomically

logger = logging.getLogger(__name__)
WAITS = (1.0, 4.0, 10.0)
"""Seconds before each further attempt after an error of the network, or a status of 429 or of 500 and more."""
LABELS = {"a": "first", "b": "second", "tie": "tie"}
UNREADABLE = "unreadable"
LONGEST = 500
"""Maximum number of characters of a reply that is kept or shown."""
_VERDICT = re.compile(r"\[\[\s*(a|b|tie)\s*\]\]", re.IGNORECASE)


class Reply(NamedTuple):
    """A judge's reply. choice: first, second, tie or unreadable; model: the name that the endpoint gives, if any."""

    choice: str
    text: str
    model: str | None = None


class Question(NamedTuple):
    """A comparison in one order."""

    prompt: str
    first: str
    second: str
    reference: str


Ask = Callable[[Question], Reply]


def judge_pairs(judge: Judge, pairs: Sequence[Mapping[str, str]], cache: Path, root: Path) -> dict[str, Any]:
    """Return the judge's verdicts on pairs of answers.

    Args:
        judge: The section `gate.judge` of params.yaml.
        pairs: Mappings with id, prompt, reference, candidate and champion; the last two are the answers.
        cache: Folder of the cache; created if it is missing.
        root: The repository, with the judge's file.

    Returns:
        A mapping with the keys `identity` (the values that decide the verdicts, and the models that the endpoint names)
        and `rows`. A row has the keys of its pair and `replies`, with the choice and the text for either order: the
        candidate's answer first, then the champion's. Equal answers have no replies.

    Raises:
        StageError: The judge cannot be used, fails, or does not answer.
    """
    identity = judge.identity(root)
    questions = {
        Question(pair["prompt"], *answers, pair["reference"]): None
        for pair in pairs
        if pair["candidate"] != pair["champion"]
        for answers in ((pair["candidate"], pair["champion"]), (pair["champion"], pair["candidate"]))
    }
    cache.mkdir(parents=True, exist_ok=True)
    replies: dict[Question, Reply] = {}
    with _opened(judge, root) as ask, progress(len(questions), "judge", "answer") as bar:
        for question, reply in _all_replies(ask, list(questions), identity, cache, judge):
            replies[question] = reply
            bar.update(1)
    rows = []
    for pair in pairs:
        one, other = pair["candidate"], pair["champion"]
        orders = [] if one == other else [(one, other), (other, one)]
        of_pair = [replies[Question(pair["prompt"], *order, pair["reference"])] for order in orders]
        rows.append({**pair, "replies": [{"choice": reply.choice, "text": reply.text} for reply in of_pair]})
    served = sorted({reply.model for reply in replies.values() if reply.model is not None})
    return {"identity": identity | ({"served": served} if served else {}), "rows": rows}


def read_choice(text: str) -> str:
    """Return first, second, tie or unreadable: the last [[A]], [[B]] or [[tie]] of a reply, or a reply of that word."""
    found = _VERDICT.findall(text)
    word = found[-1] if found else re.sub(r"[\W_]", "", text)
    return LABELS.get(word.lower(), UNREADABLE)


def _all_replies(
    ask: Ask, questions: list[Question], identity: Mapping[str, Any], cache: Path, judge: Judge
) -> Iterator[tuple[Question, Reply]]:
    """Yield the questions with their replies. Replies before an error stay in the cache."""
    # a function of the repository need not be safe for threads
    pool = ThreadPoolExecutor(1 if judge.function else judge.parallel)
    try:
        yield from zip(questions, pool.map(lambda one: _cached(ask, one, identity, cache), questions), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _cached(ask: Ask, question: Question, identity: Mapping[str, Any], cache: Path) -> Reply:
    """Return the reply from the cache, or ask and keep a readable reply."""
    content = {"judge": identity, **question._asdict()}
    path = cache / f"{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}.json"
    if path.exists():
        try:
            return Reply(**json.loads(path.read_text(encoding="utf-8"))["reply"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s cannot be read (%s); the judge is asked again", path, error)
    reply = ask(question)
    if reply.choice != UNREADABLE:
        write_atomically(path, json.dumps(content | {"reply": reply._asdict()}, indent=1) + "\n")
    return reply


@contextmanager
def _opened(judge: Judge, root: Path) -> Iterator[Ask]:
    """Yield the function that asks the judge."""
    if judge.function:
        yield _of_function(judge, root)
        return
    assert judge.endpoint is not None
    template = _template(judge, root)
    with httpx.Client(headers=_headers(judge), timeout=judge.timeout) as client:
        yield lambda question: _ask_endpoint(client, judge, fill_template(template, _values(judge, question)))


def _of_function(judge: Judge, root: Path) -> Ask:
    assert judge.function is not None
    function = load_function(*judge.function, root, "gate.judge")
    try:
        inspect.signature(function).bind("prompt", "first", "second", "reference")
    except TypeError as error:
        raise StageError(
            f"gate.judge: {judge.callable} is called with (prompt, first, second, reference), which it does not take: "
            f"{error}"
        ) from error

    def ask(question: Question) -> Reply:
        try:
            value = function(*question)
        except Exception as error:
            raise StageError(f"gate.judge: {judge.callable} failed: {type(error).__name__}: {error}") from error
        known = isinstance(value, str) and value in LABELS.values()
        return Reply(value if known else UNREADABLE, "" if known else repr(value)[:LONGEST])

    return ask


def _template(judge: Judge, root: Path) -> str:
    """Return the text of the template. Raises StageError if its file does not fit."""
    if judge.template is None:
        return TEMPLATE
    try:
        text = (root / judge.template).read_text(encoding="utf-8")
        check_template(text)
    except (OSError, ValueError) as error:
        raise StageError(f"gate.judge.template: {judge.template} does not fit: {error}") from error
    if judge.criterion != Judge().criterion and "{criterion}" not in text:
        raise StageError(f"gate.judge.criterion is not used: {judge.template} lacks {{criterion}}; add it there")
    return text


def _values(judge: Judge, question: Question) -> dict[str, str]:
    return {"criterion": judge.criterion, **question._asdict()}


def _headers(judge: Judge) -> dict[str, str]:
    """Return the header with the key. Raises StageError if the environment lacks the key."""
    if judge.api_key is None:
        return {}
    name = judge.api_key.removeprefix("env:")
    key = os.environ.get(name, "").strip()
    if not key:
        raise StageError(f"gate.judge.api_key: the environment variable {name} is not set; export the key of the judge")
    return {"authorization": f"Bearer {key}"}


def _ask_endpoint(client: httpx.Client, judge: Judge, request: str) -> Reply:
    """Return the endpoint's reply to one request."""
    address = f"{str(judge.endpoint).rstrip('/')}/chat/completions"
    body = {"model": judge.model, "messages": [{"role": "user", "content": request}], **judge.options}
    reason = ""
    for wait in (0.0, *WAITS):
        time.sleep(wait)
        try:
            response = client.post(address, json=body)
        except httpx.InvalidURL as error:
            raise StageError(f"gate.judge.endpoint: {address} is no address ({error})") from error
        except httpx.HTTPError as error:
            reason = f"{type(error).__name__}: {error}"
            continue
        if response.is_success:
            return _read(response, address)
        reason = f"status {response.status_code}: {response.text[:LONGEST]}"
        if response.status_code != 429 and response.status_code < 500:
            break
    raise StageError(
        f"gate.judge: {address} does not answer ({reason}); start it, or change gate.judge. Verdicts so far are kept, "
        "so the next `peftcore promote` asks for the others only"
    )


def _read(response: httpx.Response, address: str) -> Reply:
    try:
        content = response.json()
        text = content["choices"][0]["message"]["content"] or ""
        model = content.get("model")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise StageError(
            f"gate.judge: {address} is no OpenAI-compatible endpoint: its answer has no choices[0].message.content: "
            f"{response.text[:LONGEST]}"
        ) from error
    choice = read_choice(text) if isinstance(text, str) else UNREADABLE
    return Reply(choice, str(text)[-LONGEST:], model if isinstance(model, str) else None)
