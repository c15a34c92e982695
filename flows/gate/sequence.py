"""Sequential looks: control of the error over all candidates that are compared on the same or overlapping test rows.

Alpha spending, the online form of Bonferroni's correction (Foster and Stine, 2008, "Alpha-investing"; Tian and Ramdas,
2021, "Online control of the familywise error rate"). Look n gets a level, and the levels of all looks add up to at most
alpha. A candidate that is no better passes its look with a probability of at most the look's level. So the probability
that any such candidate passes is at most alpha, however many rows the looks share.

A version is a look, and its number follows from the registry's tags. So no further state can be lost, and judging a
version twice against the same champion spends nothing twice.
"""

from dataclasses import dataclass
from math import ceil, floor, log10

from flows.params import Gate, LookSequence
from flows.registry.reader import RegistryReader, Version

LATER = 0.1
"""Part of a version's level that is kept for comparisons with later champions."""
TAIL = 10
"""Resamples of the bootstrap that are expected beyond the bound, at least."""
MOST_RESAMPLES = 20_000_000
"""Maximum number of resamples, which take some minutes; smaller levels than TAIL / MOST_RESAMPLES cannot be tested."""


@dataclass(frozen=True)
class Look:
    """One version's place in the sequence."""

    number: int
    """Number of the version among those that count, from 1."""
    champion: int
    """Number of the champion among those that the version can have met, from 1."""
    level: float
    """Probability that the version passes this comparison if it is no better."""
    left: float
    """Part of alpha that is left for later versions."""

    def in_words(self, sequence: LookSequence) -> str:
        """Return number, level and budget in words."""
        period = f", in periods of {sequence.looks}" if sequence.spending == "even" else ""
        again = f", champion {self.champion} of this version" if self.champion > 1 else ""
        return (
            f"look {self.number}{period}{again}: level {self.level:.3g}; "
            f"{self.left:.3g} of the budget of {sequence.alpha:g} is left"
        )


def level_of(sequence: LookSequence, number: int) -> float:
    """Return the level of look `number` (from 1): the part of alpha that one version spends.

    even: alpha / looks. decreasing: alpha * looks / ((looks + number - 1) * (looks + number)), which add up to
    alpha * n / (looks + n) after n looks: half of alpha after `looks` looks, and never all of it.

    Raises:
        ValueError: alpha is None, or number is below 1.
    """
    if sequence.alpha is None or number < 1:
        raise ValueError(f"a level needs alpha and a number of at least 1, got {sequence.alpha} and {number}")
    looks = sequence.looks
    if sequence.spending == "even":
        return sequence.alpha / looks
    return sequence.alpha * looks / ((looks + number - 1) * (looks + number))


def left_after(sequence: LookSequence, number: int) -> float:
    """Return the part of alpha that is left after look `number`; with even spending, within the period of this look."""
    if sequence.alpha is None or number < 1:
        raise ValueError(f"a budget needs alpha and a number of at least 1, got {sequence.alpha} and {number}")
    looks = sequence.looks
    if sequence.spending == "even":
        return sequence.alpha * (looks - 1 - (number - 1) % looks) / looks
    return sequence.alpha * looks / (looks + number)


def part_for(champion: int) -> float:
    """Return the part of a version's level for its comparison with the first, second, ... champion that it meets.

    The first gets 0.9, and each further one a tenth of the one before. The sum is at most 1.
    """
    return (1 - LATER) * LATER ** (champion - 1)


def look_of(registry: RegistryReader, version: Version, gate: Gate) -> Look | None:
    """Return a version's place in the sequence of looks; None if `gate.sequence.alpha` is null.

    Args:
        registry: the registry.
        version: a registered version; with the scope test_rows it needs a readable record.
        gate: the limits; the stage's changes tell how many champions the version can have met.

    Raises:
        RegistryError: the scope is test_rows, and the version has no readable record.
    """
    sequence = gate.sequence
    if sequence.alpha is None:
        return None
    versions = [one for one in registry.versions_ever() if one.parts <= version.parts]
    if sequence.scope == "test_rows":
        rows = registry.record(version)["evaluation_set"]
        number = sum(record["evaluation_set"] == rows for record in registry.records(versions).values())
    else:
        number = len(versions)
    changes = registry.stage_changes(gate.stage)
    since = sum(created >= version.created for created in changes)
    # a version that was registered while the stage was free has met no champion before the first change
    champion = max(1, since + (since < len(changes)))
    level = level_of(sequence, number) * part_for(champion)
    return Look(number, champion, level, left_after(sequence, number))


def look_result(look: Look, sequence: LookSequence, has_comparison: bool) -> tuple[bool, str]:
    """Return (passed, detail) of the check that the level of a look can be tested.

    Each champion that a version meets leaves a tenth of the level, so the level of an old version may be too small.

    Args:
        look: the version's look.
        sequence: the section `gate.sequence`.
        has_comparison: the version is compared with a champion.
    """
    words = look.in_words(sequence)
    if not has_comparison or look.level * MOST_RESAMPLES >= TAIL:
        return True, words
    return False, (
        f"{words}; the level is too small for a bootstrap of {MOST_RESAMPLES:,} resamples, so nothing can be shown at "
        "it; train a new version, or give back a stage that this version had by `peftcore rollback --to`"
    )


def at_look(gate: Gate, look: Look | None) -> Gate:
    """Return the limits with the confidence of a look, for the comparisons with the champion on test rows.

    `gate.champion.confidence` stays if it is stricter. The bootstrap gets enough resamples for the look's level.
    """
    if look is None:
        return gate
    rule = gate.champion
    confidence = max(rule.confidence, 1 - look.level)
    resamples = max(rule.resamples, min(MOST_RESAMPLES, ceil(TAIL / max(1 - confidence, TAIL / MOST_RESAMPLES))))
    champion = rule.model_copy(update={"confidence": confidence, "resamples": resamples})
    return gate.model_copy(update={"champion": champion})


def percent(confidence: float) -> str:
    """Return a confidence in percent, with up to two significant digits of its distance from 100 %."""
    digits = max(0, -floor(log10(1 - confidence)) - 1)
    return f"{round(100 * confidence, digits):.10g}%"
