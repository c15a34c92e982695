"""`params.yaml`: a typed section for each of its mappings, the reader of the file, and overrides of its keys."""

from flows.params.benchmarks import Benchmark
from flows.params.data import DEMONSTRATION, DEMONSTRATION_PROMPT, Data, MixedSource, source_names
from flows.params.demonstration import left_over
from flows.params.evaluate import Control, Evaluate, Merge
from flows.params.file import read_params, read_some
from flows.params.gate import Champion, Gate, LookSequence, Register, Rule, Slices
from flows.params.grpo import Grpo, Reward, RewardSum, reward_identities
from flows.params.judge import Judge
from flows.params.method import AutoRank, Method, Quantization
from flows.params.overrides import apply_overrides, check_overrides, forced, parameter_sets
from flows.params.params import Base, Params, Project, Tracking, load_params
from flows.params.retrain import Drift, Retrain
from flows.params.scorers import Scorer
from flows.params.section import Section
from flows.params.suites import Suite, load_suites
from flows.params.train import (
    SEQUENCE_CLASSIFIERS,
    Classification,
    OnBadLoss,
    OnOutOfMemory,
    Preference,
    TokenClassification,
    Train,
)
from flows.params.webhooks import EVENT_TYPES, Endpoint, EventType, Webhooks

__all__ = [
    "DEMONSTRATION",
    "DEMONSTRATION_PROMPT",
    "EVENT_TYPES",
    "SEQUENCE_CLASSIFIERS",
    "AutoRank",
    "Base",
    "Benchmark",
    "Champion",
    "Classification",
    "Control",
    "Data",
    "Drift",
    "Endpoint",
    "Evaluate",
    "EventType",
    "Gate",
    "Grpo",
    "Judge",
    "LookSequence",
    "Merge",
    "Method",
    "MixedSource",
    "OnBadLoss",
    "OnOutOfMemory",
    "Params",
    "Preference",
    "Project",
    "Quantization",
    "Register",
    "Retrain",
    "Reward",
    "RewardSum",
    "Rule",
    "Scorer",
    "Section",
    "Slices",
    "Suite",
    "TokenClassification",
    "Tracking",
    "Train",
    "Webhooks",
    "apply_overrides",
    "check_overrides",
    "forced",
    "left_over",
    "load_params",
    "load_suites",
    "parameter_sets",
    "read_params",
    "read_some",
    "reward_identities",
    "source_names",
]
