"""Events and their JSON."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from flows.params import EventType


@dataclass(frozen=True)
class Event:
    """Something that happened to a model.

    Attributes:
        type: what happened.
        model: name of the model in the registry.
        key: what tells this event from others of its type and model. An event that is announced again after a crash
            has the same key, so it has the same id.
        data: details, values that JSON can hold.
    """

    type: EventType
    model: str
    key: str
    data: Mapping[str, Any]

    @property
    def id(self) -> str:
        """Id of the event, by which receivers deduplicate: a digest of type, model and key."""
        text = json.dumps([self.type, self.model, self.key])
        return f"evt_{hashlib.sha256(text.encode()).hexdigest()[:32]}"

    def body(self) -> str:
        """Return the JSON to send, with the present time as the event's time."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return json.dumps(
            {"id": self.id, "type": self.type, "timestamp": now, "model": self.model, "data": dict(self.data)}
        )


@dataclass(frozen=True)
class TagProof:
    """A git tag that proves that an event has happened.

    Attributes:
        tag: name of the tag.
        text: text that the tag's message has; another writer's tag of this name has another.
        remote: git remote that has to have the tag, too; None: this clone decides.
    """

    tag: str
    text: str
    remote: str | None = None
