"""Notifications by Prefect's blocks."""

import asyncio

import pytest
from prefect.blocks.core import Block

from flows.retraining.notice import notify


def test_a_notification_block_that_fails_is_warned_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []

    class Hook:
        def notify(self, body: str, subject: str) -> None:
            said.append((subject, body))

    def load(slug: str) -> Hook:
        if slug == "slack-webhook/gone":
            raise ValueError("no such block")
        return Hook()

    monkeypatch.setattr(Block, "load", staticmethod(load))
    notify(["slack-webhook/gone", "custom-webhook/here"], "docstrings: retraining kept", "why")
    assert said == [("docstrings: retraining kept", "why")]
    assert "slack-webhook/gone failed, nobody was notified by it: no such block" in caplog.text


def test_a_block_that_is_asynchronous_only_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    said = []

    class Mail:
        async def notify(self, body: str, subject: str) -> None:
            await asyncio.sleep(0)
            said.append((subject, body))

    monkeypatch.setattr(Block, "load", staticmethod(lambda slug: Mail()))
    notify(["email/team"], "docstrings: retraining failed", "why")
    assert said == [("docstrings: retraining failed", "why")]
