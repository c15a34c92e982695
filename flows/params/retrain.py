"""Section `retrain` of params.yaml: scheduled retraining and drift."""

from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import Field

from flows.params.section import NonNegative, Positive, Section, Share, Text, Whole


class Drift(Section):
    """Limits beyond which a new file of rows is quarantined."""

    rows: Annotated[int, Field(ge=2)] = 64
    min_rows: Annotated[int, Field(ge=2)] = 8
    max_loss_gap: Positive | None = 0.5
    max_divergence: Annotated[float, Field(gt=0, le=1)] | None = None


class Retrain(Section):
    """Options of `peftcore retrain`."""

    incoming: Text | None = None
    same_name: Literal["keep", "replace"] = "keep"
    start: Literal["scratch", "champion"] = "scratch"
    replay_share: Share = 0.5
    on: Literal["data", "any"] = "data"
    retries: Whole = 1
    retry_delay: NonNegative = 30.0
    stage_timeout: Positive = 21600.0
    drift: Drift = Drift()
    untrusted: list[Text] = Field(default=["feedback/*"])
    untrusted_rows: Literal["train", "wait"] = "train"
    notify: list[Text] = Field(default=[])

    def is_untrusted(self, name: str) -> bool:
        """Return True if the name of a file of rows matches a pattern of `untrusted`."""
        return any(fnmatchcase(name, pattern) for pattern in self.untrusted)
