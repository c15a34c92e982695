"""Tell people what came of a retraining, by Prefect's own notification blocks: Slack, Teams, e-mail, a web hook, ..."""

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Sequence
from typing import Any, cast

logger = logging.getLogger(__name__)


def notify(blocks: Sequence[str], subject: str, body: str) -> None:
    """Send to each block, by its slug such as `slack-webhook/team`; of one that fails a warning is left."""
    from prefect.blocks.abstract import NotificationBlock
    from prefect.blocks.core import Block

    for slug in blocks:
        try:
            sent: Any = cast(NotificationBlock, Block.load(slug)).notify(body=body, subject=subject)
            if inspect.isawaitable(sent):  # of a block that is asynchronous only
                asyncio.run(_done(sent))
        except Exception as error:  # whatever the service behind it raises; the retraining itself is done
            logger.warning("the notification block %s: %s; nobody was told by it", slug, error)


async def _done(sent: Awaitable[Any]) -> None:
    await sent
