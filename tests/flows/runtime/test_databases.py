"""URLs of SQLite files."""

from pathlib import Path

import pytest
from sql_urls import make_url

from flows.runtime.databases import sqlite_url


@pytest.mark.parametrize("name", ["plain", "with spaces", "100%20", "what?x=1", "#1", "müller"])
def test_sqlalchemy_reads_the_path_from_the_url(name: str, tmp_path: Path) -> None:
    file = tmp_path / name / "one.db"
    for driver in ("sqlite", "sqlite+aiosqlite"):
        url = make_url(sqlite_url(file, driver))
        assert (url.drivername, url.database, dict(url.query)) == (driver, str(file), {})
