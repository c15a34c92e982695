"""Times of a cron expression, as Prefect computes them, without importing Prefect."""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo


def next_time(cron: str, timezone: str, now: datetime) -> datetime:
    """Return the first time after `now`, in UTC.

    As in Prefect, the expression is of the zone's wall clock. A time that daylight saving time skips is moved by the
    skipped span (02:30 to 03:30), and of a time that comes twice only the first one counts.

    Args:
        cron: Five fields, as in '0 3 * * 1'.
        timezone: Time zone of the fields, such as Europe/Berlin.
        now: A time with its zone.

    Raises:
        ValueError: The expression does not consist of five valid fields, or there is no such time zone.
    """
    from cronsim import CronSim, CronSimError

    if not timezone:
        raise ValueError("the time zone is empty")
    zone = ZoneInfo(timezone)
    fields = cron.split()
    if len(fields) != 5:  # of six, Prefect takes the last one for the seconds, and cronsim the first one
        raise ValueError(f"it has {len(fields)} fields")
    # of a day of the month and one of the week, either one is enough; cronsim asks for both if one begins with *
    fields[2], fields[4] = fields[2].replace("*/", "1-31/"), fields[4].replace("*/", "0-6/")
    try:
        times = CronSim(" ".join(fields), now.astimezone(zone).replace(tzinfo=None))
    except CronSimError as error:
        raise ValueError(str(error)) from error
    return next(due for time in times if (due := time.replace(tzinfo=zone).astimezone(UTC)) > now)
