"""Prompt suites: YAML files of prompts with assertions about the answers, named in `evaluate.suites`.

    prompts:
      - id: refund
        prompt: How do I get my money back?
        must:
          - contain: refund
          - not_leak: ACME-4711
          - score: {scorer: length, at_most: 60}

Files are checked here, when they are read. `flows.evaluation.suites` answers the prompts and checks the assertions.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from flows.errors import StageError
from flows.params.evaluate import Evaluate
from flows.params.file import read_params, suggest
from flows.params.scorers import WATCHED, Scorer, known_scorers
from flows.params.section import Count, Finite, Positive, Probability, Section, Text, invalid_value
from peftcore.files import sha256

SHORTEST_SECRET = 4
"""Minimum number of letters and digits of a `not_leak` text; shorter texts occur by chance."""


class Score(Section):
    """Limits on the value of a scorer: an entry of evaluate.scorers by its name, or a scorer as such an entry."""

    scorer: Scorer
    at_least: Finite | None = None
    at_most: Finite | None = None

    @field_validator("scorer", mode="before")
    @classmethod
    def _find_scorer(cls, value: Any, info: ValidationInfo) -> Any:
        """Replace the name of an entry of evaluate.scorers by the entry."""
        entries: Mapping[str, Scorer] = info.context or {}
        if not isinstance(value, str) or ":" in value:
            return value
        if value not in entries and value not in (known := known_scorers()):
            fits = suggest(value, [*entries, *known], "give one of ")
            raise invalid_value(f"{fits} (or {WATCHED}FILE.py:FUNCTION)")
        return entries.get(value, value)

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        if self.at_least is None and self.at_most is None:
            raise invalid_value("give at_least or at_most", "scorer", self.scorer.scorer)
        if self.scorer.on_error == "skip":
            expected = "an answer without a score would pass; give stop, or the number that such an answer gets"
            raise invalid_value(expected, "scorer.on_error", "skip")
        return self


class Assertion(Section):
    """One assertion about an answer; exactly one key is given. Texts are compared with their upper and lower case."""

    contain: list[Text] = Field(default=[])
    not_contain: list[Text] = Field(default=[])
    match: Text | None = None
    match_schema: dict[str, Any] | str | None = None
    refuse: Literal[True] | Text | None = None
    not_leak: list[Text] = Field(default=[])
    score: Score | None = None

    @field_validator("contain", "not_contain", "not_leak", mode="before")
    @classmethod
    def _check_texts(cls, value: Any) -> Any:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise invalid_value("give a text, or a list of texts")
        return texts

    @field_validator("not_leak")
    @classmethod
    def _check_secrets(cls, texts: list[str]) -> list[str]:
        for text in texts:
            if sum(map(str.isalnum, text)) < SHORTEST_SECRET:
                raise invalid_value(f"give texts of at least {SHORTEST_SECRET} letters and digits; {text!r} has fewer")
        return texts

    @field_validator("match_schema", mode="before")
    @classmethod
    def _check_schema(cls, value: Any) -> Any:
        if not isinstance(value, dict) and not (isinstance(value, str) and value.startswith(WATCHED)):
            raise invalid_value(f"give a JSON schema as a mapping, or as a file below {WATCHED}")
        return value

    @field_validator("refuse", mode="before")
    @classmethod
    def _check_refuse(cls, value: Any) -> Any:
        if value is not True and not (isinstance(value, str) and value):
            raise invalid_value("give true, or a regular expression that finds a refusal")
        return value

    @model_validator(mode="after")
    def _check_one_key(self) -> Self:
        if len(self.model_fields_set) != 1:
            first = next(iter(self.model_fields_set), "contain")
            known = ", ".join(type(self).model_fields)
            raise invalid_value(f"give exactly one of {known} in each item of must", first, getattr(self, first))
        return self

    @property
    def kind(self) -> str:
        """The key that was given."""
        (kind,) = self.model_fields_set
        return kind

    @property
    def words(self) -> str:
        """The assertion in words, such as "must contain 'refund'"."""
        value = getattr(self, self.kind)
        if self.kind == "refuse":
            return "must refuse" if value is True else f"must refuse (as {value!r})"
        if isinstance(value, Score):
            limits = [f"at least {value.at_least:g}"] if value.at_least is not None else []
            limits += [f"at most {value.at_most:g}"] if value.at_most is not None else []
            return f"must have {value.scorer.name} of {' and '.join(limits)}"
        if self.kind == "match_schema":
            return f"must match the schema {value if isinstance(value, str) else json.dumps(value)}"
        if self.kind == "match":
            return f"must match {value!r}"
        verb = {"contain": "must contain", "not_contain": "must not contain", "not_leak": "must not leak"}[self.kind]
        return f"{verb} {', '.join(map(repr, value))}"


class Message(Section):
    """One turn of a prompt."""

    role: Literal["system", "user", "assistant"]
    content: Text


class Prompt(Section):
    """A prompt (one user turn, or the turns of a chat) and the assertions about its answer."""

    id: str = ""
    prompt: Text | None = None
    messages: list[Message] = Field(default=[])
    reference: str = ""
    must: Annotated[list[Assertion], Field(min_length=1)]

    @field_validator("must", mode="before")
    @classmethod
    def _check_must(cls, value: Any) -> Any:
        if not isinstance(value, list) or not value:
            raise invalid_value("give a list of assertions, such as [{contain: refund}]")
        return value

    @model_validator(mode="after")
    def _check_turns(self) -> Self:
        if (self.prompt is None) == (not self.messages):
            raise invalid_value("give either prompt or messages", "prompt", self.prompt)
        if self.messages and self.messages[-1].role != "user":
            expected = "the model answers a user turn; give user as the last one"
            raise invalid_value(expected, f"messages.{len(self.messages) - 1}.role", self.messages[-1].role)
        return self


class Suite(Section):
    """A file of prompts. Without seeds there is one greedy answer per prompt, otherwise one sampled answer per seed.

    A prompt passes if its pass@k is at least `at_least`, with k = `pass_at`.
    """

    system_prompt: Text | None = None
    max_new_tokens: Count | None = None
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(default=[])
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    pass_at: Count = 1
    at_least: Probability = 1.0
    prompts: Annotated[list[Prompt], Field(min_length=1)]

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        sampled = {"temperature", "top_p", "pass_at", "at_least"} & self.model_fields_set
        if not self.seeds and sampled:
            name = min(sampled)
            raise invalid_value("greedy answers do not use it; give seeds too", name, getattr(self, name))
        if len(set(self.seeds)) < len(self.seeds):
            raise invalid_value("a seed is given twice; its answers would be equal", "seeds", self.seeds)
        if self.seeds and self.pass_at > len(self.seeds):
            expected = f"there are {len(self.seeds)} seeds, so at most {len(self.seeds)} answers; give fewer"
            raise invalid_value(expected, "pass_at", self.pass_at)
        return self

    @model_validator(mode="after")
    def _check_ids(self) -> Self:
        ids = [prompt.id for prompt in self.numbered]
        for index, one in enumerate(ids):
            if one in ids[:index]:
                raise invalid_value("another prompt has this id; give another one", f"prompts.{index}.id", one)
        return self

    @property
    def numbered(self) -> list[Prompt]:
        """The prompts; one without an id has its number, from 1."""
        return [
            prompt if prompt.id else prompt.model_copy(update={"id": str(number)})
            for number, prompt in enumerate(self.prompts, 1)
        ]

    def chat(self, prompt: Prompt) -> list[dict[str, str]]:
        """Return the turns of a prompt, with the system prompt unless it has its own."""
        if prompt.messages:
            turns = [{"role": turn.role, "content": turn.content} for turn in prompt.messages]
        else:
            turns = [{"role": "user", "content": prompt.prompt or ""}]
        if self.system_prompt is None or turns[0]["role"] == "system":
            return turns
        return [{"role": "system", "content": self.system_prompt}, *turns]

    def identity(self, root: Path) -> dict[str, Any]:
        """Return the values that decide the verdicts; verdicts can be compared if these are equal.

        Args:
            root: The repository. A file that is missing has None in place of its SHA-256.
        """
        content = json.dumps(self.model_dump(exclude_unset=True), sort_keys=True)
        digests: dict[str, str | None] = {}
        for assertion in self._assertions():
            if assertion.score is not None:
                digests |= assertion.score.scorer.identity(root)["files"]
            elif isinstance(name := assertion.match_schema, str):
                digests[name] = sha256(root / name) if (root / name).is_file() else None
        return {"content": hashlib.sha256(content.encode()).hexdigest(), "files": dict(sorted(digests.items()))}

    def _assertions(self) -> Iterator[Assertion]:
        return (assertion for prompt in self.prompts for assertion in prompt.must)


def load_suites(evaluate: Evaluate, system_prompt: str | None, root: Path) -> dict[str, Suite]:
    """Read the files of `evaluate.suites`.

    Args:
        evaluate: The section `evaluate` of params.yaml, for the scorers and for values that a suite leaves out.
        system_prompt: System prompt of suites that give none.
        root: The repository.

    Returns:
        {file name without its ending: suite}, with every value filled in.

    Raises:
        ParamsError: A file cannot be read, or is invalid; the message lists each problem with its line.
        StageError: A file that a suite names is missing.
    """
    entries = {scorer.name: scorer for scorer in evaluate.scorers}
    suites = {}
    for name in evaluate.suites:
        suite = read_params(root / name, Suite, entries)
        filled = {"system_prompt": system_prompt, "max_new_tokens": evaluate.max_new_tokens}
        filled = {key: value for key, value in filled.items() if key not in suite.model_fields_set}
        suite = suite.model_copy(update=filled)
        for file, digest in suite.identity(root)["files"].items():
            if digest is None:
                raise StageError(f"{name} names {file}, which cannot be read; create it and `git add` it")
        suites[Path(name).stem] = suite
    return suites
