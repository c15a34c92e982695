"""The next time of a schedule is the one at which Prefect starts the run, also where the clock changes."""

import asyncio
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from flows.runtime.cron import next_time

CHANGES = ["2026-03-28T23:00+00:00", "2026-10-24T22:00+00:00", "2026-10-25T00:59+00:00", "2026-10-25T01:15+00:00"]
"""The evenings before the changes in Berlin; the last minute of summer time; 02:15 for the second time."""


@pytest.mark.parametrize(
    "cron",
    [
        *("30 2 * * *", "0 3 * * *", "0 2 * * 0", "20 2 * * *", "0 * * * *", "*/20 1-3 * * *"),
        *("0 3 */2 * 1", "0 3 13 * */3", "0 3 1-7 * 1", "0 3 * * sat-sun"),
        *("0 3 ? * fri-mon", "0 3 l * *", "0 22-2 * * *"),
    ],
)
@pytest.mark.parametrize("timezone", ["Europe/Berlin", "Australia/Lord_Howe"])
@pytest.mark.parametrize("start", CHANGES)
def test_times_are_prefects(cron: str, timezone: str, start: str) -> None:
    from prefect.server.schemas.schedules import CronSchedule

    now = datetime.fromisoformat(start)
    schedule = CronSchedule(cron=cron, timezone=timezone)
    after = asyncio.run(schedule.get_dates(n=6, start=now + timedelta(seconds=1)))
    times = [now]
    while len(times) <= 4:
        times.append(next_time(cron, timezone, times[-1]))
    assert times[1:] == sorted(time.astimezone(UTC) for time in after if time > now)[:4]


def test_a_skipped_time_is_moved_and_a_repeated_one_counts_once() -> None:
    berlin = ZoneInfo("Europe/Berlin")
    spring = next_time("30 2 * * *", "Europe/Berlin", datetime(2026, 3, 29, tzinfo=berlin))
    assert spring.astimezone(berlin).isoformat() == "2026-03-29T03:30:00+02:00"
    first = next_time("30 2 * * *", "Europe/Berlin", datetime(2026, 10, 25, tzinfo=berlin))
    assert first.astimezone(berlin).isoformat() == "2026-10-25T02:30:00+02:00"
    second = next_time("30 2 * * *", "Europe/Berlin", first)
    assert second.astimezone(berlin).isoformat() == "2026-10-26T02:30:00+01:00"


@pytest.mark.parametrize(
    ("cron", "timezone", "message"),
    [
        ("@daily", "UTC", "1 field$"),
        ("0 0 3 * * 1", "UTC", "6 fields"),
        ("0 3 * * 1", "", "time zone is empty"),
        ("0 3 * * 1", "Mars/Olympus", "timezone"),
        ("0 3 * * 8", "UTC", "Invalid cron string"),
        ("R(0-3) 3 * * *", "UTC", "a field with R is random"),  # Prefect takes it
        ("0 3 * * r", "UTC", "a field with R is random"),
        ("0 3 31 2 *", "UTC", "no date fits"),
        ("0 0 30 2 1", "UTC", "no date fits"),  # Prefect never starts it, though February has Mondays
    ],
)
def test_what_is_no_schedule_is_an_error(cron: str, timezone: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next_time(cron, timezone, datetime(2026, 1, 1, tzinfo=UTC))
