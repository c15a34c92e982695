"""The two sides of the gate's comparison: the version to judge, and the version that holds the stage now."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flows.gate.sequence import Look
from flows.registry.signatures import Signature

if TYPE_CHECKING:
    import pyarrow

CheckResult = tuple[bool, str]
"""(passed, detail) of one check. The detail says what was measured and what is allowed."""
ResultWithFigures = tuple[bool, str, Mapping[str, Any]]
"""A `CheckResult` and the figures behind its detail, which the report keeps."""


class HoldoutReuse(NamedTuple):
    """Counts of earlier comparisons. The more there are, the likelier a candidate passes by chance."""

    test_rows: int
    """Versions that were evaluated on these test rows, this version included."""
    trials: int
    """Trials of sweeps on the same prepared data, ranked by their validation rows."""
    since_champion: int
    """Versions registered since the champion got its stage, this version included."""


@dataclass(frozen=True)
class Candidate:
    """The version to judge, and everything that the gate's checks read about it.

    Attributes:
        name: the model's name.
        version: the version's number.
        adapter: the adapter's folder.
        files: {file name: SHA-256} of the adapter, as registered.
        metrics: the JSON that the evaluate stage wrote.
        merge: the JSON that the merge stage wrote.
        rows: the evaluation's table with one row per test row (id, tokens, adapter_loss).
    """

    name: str
    version: str
    adapter: Path
    files: Mapping[str, str]
    metrics: Mapping[str, Any]
    merge: Mapping[str, Any]
    rows: "pyarrow.Table"
    control: "pyarrow.Table | None" = None
    """Losses of base and adapter on the control set; None if it was not measured."""
    evidence: Mapping[Path, str | None] = field(default_factory=dict)
    """{file of the evaluation or the merge: its registered SHA-256; None if the record has none}"""
    record: Mapping[str, Any] = field(default_factory=dict)
    """The version's lineage record."""
    unmeasured: tuple[str, ...] = ()
    """Differences between the evaluation's settings and the settings that the rules require, in words."""
    content: str | None = None
    """SHA-256 of the adapter, from the version's tag."""
    signature: Signature | None = None
    """Signature of the version's tag; None if signatures are not required."""
    approved_by: tuple[str, ...] = ()
    """People who approved the version, without the person who registered it."""
    unsigned_approvals: int = 0
    """Number of approvals that do not count because no listed person signed them."""
    withdrawn: str | None = None
    """How this adapter lost the stage, for example by a rollback; None if it did not."""
    again: bool = False
    """True if a person asked to judge the version again although it had lost the stage."""
    reuse: HoldoutReuse | None = None
    look: Look | None = None
    """Place in the sequence of looks; None if `gate.sequence.alpha` is null."""
    suites: Mapping[str, Any] = field(default_factory=dict)
    """Results of the prompt suites that the evaluation answered; the content of suites.json."""
    required_suites: tuple[str, ...] = ()
    """Names of the suites of the rules."""
    required_benchmarks: tuple[str, ...] = ()
    """Names of the benchmarks of the rules."""


class AnswerPair(NamedTuple):
    """Answers of both versions to the prompt of one test row. id: of the row; reference: the known answer."""

    id: str
    reference: str
    candidate: str
    champion: str


class Reevaluation(NamedTuple):
    """Losses of one version on the other version's test rows; tables with id, tokens, adapter_loss."""

    rows: "pyarrow.Table"
    """Test rows that the version was neither trained nor validated on."""
    left_out: int
    """Number of test rows that the version was trained or validated on."""
    all_rows: "pyarrow.Table | None" = None
    """All test rows, including rows that the version was trained or validated on; None if not measured."""


@dataclass(frozen=True)
class Champion:
    """The version that holds the stage now, and everything that the gate's checks read about it."""

    version: str
    evaluation_set: str
    base_model: str
    rows: "pyarrow.Table"
    loss_function: str | None = None
    """Kind of the test loss; None in old records, where it is the cross entropy of tokens."""
    reevaluate_champion: Callable[[], Reevaluation] | None = None
    """Re-evaluates the champion on the candidate's test rows, in minutes; None if the rules forbid a re-evaluation."""
    reevaluate_candidate: Callable[[], Reevaluation] | None = None
    """Re-evaluates the candidate on the champion's test rows, in minutes; None if the rules forbid a re-evaluation."""
    base_manifest: str | None = None
    """SHA-256 of the base's manifest; None in old records, where `base_model` is that digest."""
    content: str | None = None
    """SHA-256 of the adapter, from the version's tag."""
    scorers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """{name: identity of the scorer} of the champion's own evaluation."""
    max_new_tokens: int | None = None
    """Maximum tokens of the answers of the champion's own evaluation; None if its record does not say."""

    suites: Mapping[str, Any] = field(default_factory=dict)
    """Results of the prompt suites of the champion's own evaluation."""
    reevaluate_suites: Callable[[], Mapping[str, Any]] | None = None
    """Lets the champion answer the suites of the rules, in minutes; None if the rules forbid a re-evaluation."""

    benchmarks: Mapping[str, Any] = field(default_factory=dict)
    """{name: identity and figures} of the benchmarks of the champion's own evaluation."""
    reevaluate_benchmarks: Callable[[], Mapping[str, Any]] | None = None
    """Measures the champion on the benchmarks of the rules; None if the rules forbid a re-evaluation."""

    judge_answers: Callable[[Sequence[AnswerPair]], Mapping[str, Any]] | None = None
    """Lets the judge of the rules compare answers, and returns the figures; None without a judge."""

    @cached_property
    def measured_benchmarks(self) -> Mapping[str, Any] | None:
        """The champion's figures on the benchmarks of the rules, measured at the first use."""
        return self.reevaluate_benchmarks() if self.reevaluate_benchmarks else None

    @cached_property
    def answered_suites(self) -> Mapping[str, Any] | None:
        """The champion's answers to the suites of the rules, measured at the first use."""
        return self.reevaluate_suites() if self.reevaluate_suites else None

    @cached_property
    def candidate_on_own_rows(self) -> Reevaluation | None:
        """The candidate on the champion's test rows, measured at the first use."""
        return self.reevaluate_candidate() if self.reevaluate_candidate else None

    @cached_property
    def on_candidate_rows(self) -> Reevaluation | None:
        """The champion on the candidate's test rows, measured at the first use.

        Raises:
            GateError: the two versions cannot be compared.
        """
        return self.reevaluate_champion() if self.reevaluate_champion else None
