"""Events: one id for one fact, and JSON that names it."""

import json
from datetime import datetime

from flows.webhooks.events import Event


def test_an_event_that_is_announced_again_has_the_same_id_and_other_facts_have_others() -> None:
    first = Event("promotion", "docs", "docs#champion#1", {"version": "v0.1.0"})
    again = Event("promotion", "docs", "docs#champion#1", {"version": "v0.1.0", "more": 1})
    others = [
        Event("rollback", "docs", "docs#champion#1", {}),
        Event("promotion", "other", "docs#champion#1", {}),
        Event("promotion", "docs", "docs#champion#2", {}),
        Event("promotion", "docs#champion", "#1", {}),
    ]
    assert first.id == again.id
    assert len({first.id, *(other.id for other in others)}) == 5


def test_the_body_has_id_type_time_model_and_details() -> None:
    event = Event("drift", "docs", "v0.1.0 abc", {"files": {"new.jsonl": "loss ≥ 3"}})
    body = json.loads(event.body())
    assert datetime.fromisoformat(body.pop("timestamp")).utcoffset() is not None
    assert body == {"id": event.id, "type": "drift", "model": "docs", "data": {"files": {"new.jsonl": "loss ≥ 3"}}}
