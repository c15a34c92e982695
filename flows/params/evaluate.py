"""Sections `evaluate` and `merge` of params.yaml."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from flows.params.benchmarks import Benchmark
from flows.params.file import suggest
from flows.params.scorers import WATCHED, Scorer
from flows.params.section import Count, NonNegative, Positive, Probability, Section, Text, Whole, invalid_value


class Control(Section):
    """Control set: texts of other topics, on which forgetting is measured."""

    source: Text | None = "stdlib:topics"
    rows: Annotated[int, Field(ge=2)] = 48
    max_length: Annotated[int, Field(ge=8)] = 128

    @field_validator("source")
    @classmethod
    def _check_source(cls, source: str | None) -> str | None:
        if source not in (None, "stdlib:topics") and not re.fullmatch(r"(?![A-Za-z]\w+:).+\.(jsonl|txt)", source):
            raise invalid_value("give stdlib:topics, the path of a .jsonl or .txt, or null")
        return source


class BestOfN(Section):
    """Several sampled answers to a prompt, of which a scorer chooses the best."""

    answers: Annotated[int, Field(ge=2)] | None = None
    scorer: Text | None = None
    rows: Count = 32
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _check_scorer(self) -> Self:
        if self.answers is not None and self.scorer is None:
            raise invalid_value("it chooses the best answer; give a name of evaluate.scorers", "scorer", None)
        return self


class Evaluate(Section):
    """Evaluation of the base and the adapter on the test split."""

    rows: Count | None = 256
    batch_size: Count = 32
    generate_rows: Count = 128
    max_new_tokens: Count = 40
    samples: Count = 12
    latency_rows: Whole = 4
    calibration_rows: Whole = 0
    scorers: list[Scorer] = Field(default=[])
    suites: list[Text] = Field(default=[])
    benchmarks: list[Benchmark] = Field(default=[])
    best_of_n: BestOfN = BestOfN()
    control: Control = Control()

    @model_validator(mode="after")
    def _check_scorer_names(self) -> Self:
        names = [scorer.name for scorer in self.scorers]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise invalid_value("two scorers have this name; give another one", f"scorers.{index}.name", name)
        return self

    @model_validator(mode="after")
    def _check_best_of_n(self) -> Self:
        if self.best_of_n.answers is None:
            return self
        scorers = {scorer.name: scorer for scorer in self.scorers}
        name = str(self.best_of_n.scorer)
        if name not in scorers:
            fits = suggest(name, list(scorers), "give one of ") if scorers else "there is none; add it"
            raise invalid_value(f"evaluate.scorers has no such name; {fits}", "best_of_n.scorer", name)
        if scorers[name].on_error == "skip":
            expected = "its scorer has on_error: skip, so an answer could have no score; give it another on_error"
            raise invalid_value(expected, "best_of_n.scorer", name)
        return self

    @model_validator(mode="after")
    def _check_suite_files(self) -> Self:
        names = [Path(name).stem for name in self.suites]
        for index, (name, path) in enumerate(zip(names, self.suites, strict=True)):
            if not re.fullmatch(r"data/(?!.*\.\.)[\w./-]+\.ya?ml", path):
                expected = f"give {WATCHED}FILE.yaml; the evaluate stage depends on {WATCHED}"
                raise invalid_value(expected, f"suites.{index}", path)
            if name in names[:index]:
                raise invalid_value(f"two suites are called {name}; rename a file", f"suites.{index}", path)
        return self

    @model_validator(mode="after")
    def _check_benchmark_names(self) -> Self:
        names = [benchmark.name for benchmark in self.benchmarks]
        for index, name in enumerate(names):
            if name in names[:index]:
                expected = f"another benchmark is called {name}; remove one, or rename its file"
                raise invalid_value(expected, f"benchmarks.{index}.task", self.benchmarks[index].task)
        return self

    @model_validator(mode="after")
    def _check_row_counts(self) -> Self:
        if self.rows is not None and self.generate_rows > self.rows:
            raise invalid_value(f"may not exceed rows, which is {self.rows}", "generate_rows", self.generate_rows)
        if self.samples > self.generate_rows:
            raise invalid_value(f"may not exceed generate_rows, which is {self.generate_rows}", "samples", self.samples)
        return self


class Merge(Section):
    """Base to merge into, and limits on how far the merged model may differ from the adapted one."""

    into: Literal["best", "dequantized", "original", "requantized"] = "best"
    max_kl: NonNegative = 0.05
    min_top1_agreement: Probability = 0.85
    min_cosine: Probability = 0.99
    rows: Count = 64
