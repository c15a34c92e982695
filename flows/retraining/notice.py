"""Notifications of retrainings by Prefect's notification blocks: Slack, Teams, e-mail, web hooks."""

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Sequence
from typing import Any, cast

logger = logging.getLogger(__name__)


def notify(blocks: Sequence[str], subject: str, body: str) -> None:
    """Notify each block, named by its slug such as `slack-webhook/team`; a block that fails is logged."""
    from prefect.blocks.abstract import NotificationBlock
    from prefect.blocks.core import Block

    for slug in blocks:
        try:
            sent: Any = cast(NotificationBlock, Block.load(slug)).notify(body=body, subject=subject)
            if inspect.isawaitable(sent):  # some blocks are asynchronous only
                asyncio.run(_done(sent))
        except Exception as error:  # services raise errors of any kind, and the retraining itself is done
            logger.warning("the notification block %s failed, nobody was notified by it: %s", slug, error)


async def _done(sent: Awaitable[Any]) -> None:
    await sent
