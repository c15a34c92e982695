"""Times of a cron expression, computed by Prefect itself, so that they are those at which it starts a run."""

import asyncio
import re
from datetime import UTC, datetime, timedelta

_RANDOM = re.compile(r"\br\b", re.IGNORECASE)
"""A random field. Prefect refuses R alone, and draws another time from R(0-3) whenever it looks for the next run."""


def next_time(cron: str, timezone: str, now: datetime) -> datetime:
    """Return the first time after `now`, in UTC.

    The expression is of the zone's wall clock. A time that daylight saving time skips is moved by the skipped span
    (02:30 to 03:30), and of a time that comes twice only the first one counts.

    Args:
        cron: Five fields, as in '0 3 * * 1'.
        timezone: Time zone of the fields, such as Europe/Berlin.
        now: A time with its zone.

    Raises:
        ValueError: The expression does not consist of five valid fields, one of them is random, there is no such time
            zone, or no time fits.
    """
    from prefect._vendor.croniter import CroniterBadDateError
    from prefect.server.schemas.schedules import CronSchedule
    from pydantic import ValidationError

    if not timezone:
        raise ValueError("the time zone is empty")
    if (count := len(cron.split())) != 5:  # Prefect also takes @daily, and seconds as a sixth field
        raise ValueError(f"it has {count} {'field' if count == 1 else 'fields'}")
    if _RANDOM.search(cron):
        raise ValueError("a field with R is random: Prefect takes R(0-3), and starts a run at each time that it draws")
    try:
        schedule = CronSchedule(cron=cron, timezone=timezone)
        dates = asyncio.run(schedule.get_dates(n=1, start=now.replace(microsecond=0) + timedelta(seconds=1)))
    except ValidationError as error:
        raise ValueError("; ".join(one["msg"].removeprefix("Value error, ") for one in error.errors())) from error
    except CroniterBadDateError as error:
        raise ValueError("no date fits all of its fields, so it would never start a retraining") from error
    return datetime.fromtimestamp(dates[0].timestamp(), UTC)  # in place of Prefect's subclass of datetime
