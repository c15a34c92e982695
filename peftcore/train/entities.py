"""Entities of a sequence of tags, and F1 over entities as conlleval and seqeval define it.

Scheme "bio": B-TYPE begins an entity, I-TYPE continues it, and O is outside. An I-TYPE that continues no entity of its
type begins one. Scheme "plain": every tag but O is an entity of one word.

    F1 = 2 c / (p + t)

c: predicted entities with the type and the words of a true one. p: predicted entities. t: true entities. All three are
summed over the rows. F1 is 0 if there is no entity at all.

Tjong Kim Sang and De Meulder, "Introduction to the CoNLL-2003 Shared Task" (2003); seqeval 1.2, default mode.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, get_args

from peftcore.errors import TrainingError, suggestion

TagScheme = Literal["bio", "plain"]
OUTSIDE = "O"
"""Tag of a word that belongs to no entity."""


class Entity(NamedTuple):
    """An entity: its type, the index of its first word, and the index after its last word."""

    type: str
    start: int
    stop: int


class EntityCounts(NamedTuple):
    """Numbers of entities: predicted ones that are true, predicted ones, and true ones."""

    correct: int
    predicted: int
    true: int

    @property
    def precision(self) -> float:
        """Share of the predicted entities that are true; 0 if none is predicted."""
        return self.correct / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        """Share of the true entities that are predicted; 0 if there is none."""
        return self.correct / self.true if self.true else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 0 if there is no entity at all."""
        every = self.predicted + self.true
        return 2 * self.correct / every if every else 0.0


def is_bio_tag(tag: str) -> bool:
    """Return True if a tag is O, B-TYPE or I-TYPE."""
    return tag == OUTSIDE or (tag[:2] in ("B-", "I-") and len(tag) > 2)


def entities(tags: Sequence[str], scheme: TagScheme = "bio") -> list[Entity]:
    """Return the entities of one row, in order.

    Args:
        tags: A tag for each word.
        scheme: "bio" or "plain".

    Raises:
        TrainingError: The scheme is unknown, or a tag is not of the scheme "bio".
    """
    if scheme not in get_args(TagScheme):
        raise TrainingError(f"scheme is {scheme!r}{suggestion(str(scheme), get_args(TagScheme))}")
    if scheme == "plain":
        return [Entity(tag, i, i + 1) for i, tag in enumerate(tags) if tag != OUTSIDE]
    found: list[Entity] = []
    for i, tag in enumerate(tags):
        if not is_bio_tag(tag):
            raise TrainingError(
                f"tag {tag!r} of word {i} is not O, B-TYPE or I-TYPE; give such tags, or scheme='plain'"
            )
        if tag == OUTSIDE:
            continue
        continues = bool(found) and tag[0] == "I" and found[-1].stop == i and found[-1].type == tag[2:]
        if continues:
            found[-1] = found[-1]._replace(stop=i + 1)
        else:
            found.append(Entity(tag[2:], i, i + 1))
    return found


def entity_counts(true: Sequence[str], predicted: Sequence[str], scheme: TagScheme = "bio") -> EntityCounts:
    """Count the entities of one row.

    Args:
        true: The true tag of each word.
        predicted: The predicted tag of each word.
        scheme: "bio" or "plain".

    Raises:
        TrainingError: The two differ in length, or see `entities`.
    """
    if len(true) != len(predicted):
        raise TrainingError(f"{len(predicted)} predicted tags for {len(true)} words; give one tag for each word")
    known, told = set(entities(true, scheme)), set(entities(predicted, scheme))
    return EntityCounts(len(known & told), len(told), len(known))


def summed_counts(rows: Iterable[EntityCounts]) -> EntityCounts:
    """Return the sums of the rows' counts."""
    sums = [0, 0, 0]
    for row in rows:
        sums = [total + count for total, count in zip(sums, row, strict=True)]
    return EntityCounts(*sums)
