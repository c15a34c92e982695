"""A grammar of fixed texts for the tests' tokenizer of one token a byte, as a stand-in for a library of grammars."""

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peftcore.serving.errors import GrammarError
from peftcore.serving.grammar import Compile, GrammarSpec

END = 2
"""Id of the tokenizer's end-of-sequence token."""


@dataclass
class ChoiceMatcher:
    """Allows the next tokens of the texts that begin with the tokens so far."""

    texts: list[list[int]]
    vocabulary: int
    tokens: list[int] = field(default_factory=list)
    fails_at: int | None = None
    """Number of tokens after which `allowed` raises an error."""

    def _next(self) -> set[int]:
        place = len(self.tokens)
        going = [text for text in self.texts if text[:place] == self.tokens]
        return {text[place] if place < len(text) else END for text in going}

    def allowed(self) -> Tensor:
        if self.fails_at == len(self.tokens):
            raise GrammarError("structured_outputs: too complex", "structured_outputs")
        mask = torch.zeros(self.vocabulary, dtype=torch.bool)
        mask[list(self._next())] = True
        return mask

    def accept(self, token: int) -> None:
        assert token in self._next(), "the mask was not applied"
        self.tokens.append(token)

    @property
    def complete(self) -> bool:
        return self._next() == {END}


@dataclass
class ChoiceGrammar:
    """Exactly one of some texts."""

    texts: list[list[int]]
    vocabulary: int
    fails_at: int | None = None

    def matcher(self) -> ChoiceMatcher:
        return ChoiceMatcher(self.texts, self.vocabulary, fails_at=self.fails_at)


def choice_compiler(tokenizer: Any, specs: list[GrammarSpec] | None = None, texts: list[str] | None = None) -> Compile:
    """Return a function that compiles the kind `choice`, or any grammar if its texts are given.

    Args:
        tokenizer: Tokenizer of the model.
        specs: Collects what was compiled.
        texts: Texts of every grammar; "json_schema" is then as good as "choice".
    """

    def compile_one(spec: GrammarSpec) -> ChoiceGrammar:
        if specs is not None:
            specs.append(spec)
        if texts is None and spec.kind != "choice":
            raise GrammarError(f"{spec.param}: {spec.kind} is not supported", spec.param)
        chosen = json.loads(spec.text) if texts is None else texts
        return ChoiceGrammar([tokenizer(text)["input_ids"] for text in chosen], len(tokenizer))

    return compile_one
