"""What the gate compares: the version to judge, and the one that holds the stage now."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flows.promotion.signatures import Signature

if TYPE_CHECKING:
    import pyarrow

Outcome = tuple[bool, str]
"""Whether a check is passed, and what was found and what is allowed."""


@dataclass(frozen=True)
class Candidate:
    """What a version is judged by.

    name: of the model; adapter: its folder; files: {name: SHA-256} from when it was registered; metrics, merge: the
    JSON that evaluate and merge wrote; rows: evaluate's table with one row a test row (id, tokens, adapter_loss).
    """

    name: str
    version: str
    adapter: Path
    files: Mapping[str, str]
    metrics: Mapping[str, Any]
    merge: Mapping[str, Any]
    rows: "pyarrow.Table"
    control: "pyarrow.Table | None" = None
    """Losses of base and adapter on the control set; None where it was not measured."""
    content: str | None = None
    """The adapter's digest, as the version's tag tells it."""
    signature: Signature | None = None
    """Of the version's tag; None where none is asked for."""
    approved_by: tuple[str, ...] = ()
    """Different people, without who registered it."""


class Remeasured(NamedTuple):
    """The champion on the candidate's test rows (id, tokens, adapter_loss)."""

    rows: "pyarrow.Table"
    left_out: int
    """Test rows that it had been trained or validated on; they are not among `rows`."""


@dataclass(frozen=True)
class Champion:
    """The version that holds the stage now, and what it was judged by."""

    version: str
    evaluation_set: str
    base_model: str
    rows: "pyarrow.Table"
    loss_function: str | None = None
    """What its test loss is; None: it was registered before that was written down, when it was that of tokens."""
    measure_again: Callable[[], Remeasured] | None = None
    """Measures it on the candidate's test rows, which takes a while; None: it may not be."""

    @cached_property
    def again(self) -> Remeasured | None:
        """What `measure_again` finds, found once. Raises GateError where the two cannot be compared."""
        return self.measure_again() if self.measure_again else None
