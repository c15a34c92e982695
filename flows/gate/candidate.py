"""What the gate compares: the version to judge, and the one that holds the stage now."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flows.registry.signatures import Signature

if TYPE_CHECKING:
    import pyarrow

Outcome = tuple[bool, str]
"""Whether a check is passed, and what was found and what is allowed."""


class Looks(NamedTuple):
    """How many tries this version is the best or the last of: the more, the likelier one is promoted by chance."""

    test_rows: int
    """Versions that were evaluated on these test rows, up to this one and with it."""
    trials: int
    """Trials of sweeps on the same prepared data, ranked by their validation rows."""
    since_champion: int
    """Versions registered since the champion got its stage, up to this one and with it."""


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
    evidence: Mapping[Path, str | None] = field(default_factory=dict)
    """{file of the evaluation or the merge: its SHA-256 from when the version was registered, None if it has none}"""
    record: Mapping[str, Any] = field(default_factory=dict)
    """The version's lineage record."""
    unmeasured: tuple[str, ...] = ()
    """What the rules ask for and the version was not measured by, in words."""
    content: str | None = None
    """The adapter's digest, as the version's tag tells it."""
    signature: Signature | None = None
    """Of the version's tag; None where none is asked for."""
    approved_by: tuple[str, ...] = ()
    """Different people, without who registered it."""
    unsigned_approvals: int = 0
    """Approvals that do not count, because no listed signer made them."""
    taken_back: str | None = None
    """How the stage was taken back from this adapter, by a rollback for example; None: it was not."""
    again: bool = False
    """Whether somebody asked for it all the same."""
    looks: Looks | None = None


class Remeasured(NamedTuple):
    """A version on the other one's test rows; tables of id, tokens, adapter_loss."""

    rows: "pyarrow.Table"
    left_out: int
    """Test rows that it had been trained or validated on; they are not among `rows`."""
    all_rows: "pyarrow.Table | None" = None
    """Those as well; None where they were not measured."""


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
    measure_candidate: Callable[[], Remeasured] | None = None
    """Measures the candidate on this version's test rows, which takes a while; None: it may not be."""
    base_manifest: str | None = None
    """The digest of the base's manifest; None: the version is from when `base_model` was that digest."""
    content: str | None = None
    """The adapter's digest, as the version's tag tells it."""

    @cached_property
    def candidate_there(self) -> Remeasured | None:
        """What `measure_candidate` finds, found once."""
        return self.measure_candidate() if self.measure_candidate else None

    @cached_property
    def again(self) -> Remeasured | None:
        """What `measure_again` finds, found once. Raises GateError where the two cannot be compared."""
        return self.measure_again() if self.measure_again else None
