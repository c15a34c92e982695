"""Mirroring of a run to Weights & Biases, MLflow and TensorBoard: `tracking.backends` of params.yaml.

The run reads nothing back, and an error of a backend never fails the run. A failure gives one warning, and the run
continues without that backend.
"""

from flows.runtime.tracking.tracker import Backend, Tracker
from flows.runtime.tracking.versions import mirror_judgement, mirror_promotion, mirror_version
from flows.runtime.tracking.wandb_run import EVALUATES, LOGIN_SECONDS

__all__ = [
    "EVALUATES",
    "LOGIN_SECONDS",
    "Backend",
    "Tracker",
    "mirror_judgement",
    "mirror_promotion",
    "mirror_version",
]
