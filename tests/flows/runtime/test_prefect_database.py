"""The empty database that Prefect's servers start with: kept once, copied, and never put over another one."""

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import prefect
import pytest
from prefect.settings import PREFECT_HOME, PREFECT_SERVER_DATABASE_CONNECTION_URL, temporary_settings

from flows.runtime.prefect_database import copy_empty_database, keep_empty_database

FILE = "prefect.db"
NAME = f"prefect-{prefect.__version__}.db"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a user, which is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "peftcore"
    folder.mkdir(parents=True)
    return folder


def in_folder(home: Path, function: Callable[[], None]) -> None:
    """Call a function as a command does that uses Prefect in `home`."""
    with temporary_settings({PREFECT_HOME: home}, restore_defaults={PREFECT_SERVER_DATABASE_CONNECTION_URL}):
        function()


def content(database: Path) -> dict[str, list[Any]]:
    """Return the rows of each table that has rows, and the schema."""
    with closing(sqlite3.connect(database)) as connection:
        schema = connection.execute("SELECT type, name, sql FROM sqlite_master ORDER BY name").fetchall()
        tables = [name for kind, name, _ in schema if kind == "table"]
        rows = {name: connection.execute(f'SELECT * FROM "{name}"').fetchall() for name in tables}
    return {name: found for name, found in rows.items() if found} | {"schema": schema}


@pytest.mark.slow
def test_the_copy_is_what_prefects_own_migrations_make(cache: Path, tmp_path: Path) -> None:
    used, new = tmp_path / "used", tmp_path / "new"
    command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y"]
    subprocess.run(command, env=os.environ | {"PREFECT_HOME": str(used)}, check=True, capture_output=True)
    expected = content(used / FILE)
    with closing(sqlite3.connect(used / FILE)) as database:
        database.execute("INSERT INTO flow (id, name) VALUES ('1', 'a secret name')")
        database.execute("INSERT INTO flow_run (id, flow_id, name) VALUES ('2', '1', 'a secret name')")
        database.commit()
    in_folder(used, keep_empty_database)
    in_folder(new, copy_empty_database)
    assert content(new / FILE) == expected
    assert len(expected["schema"]) > 100 and set(expected) == {"schema", "alembic_version"}
    assert b"a secret name" in (used / FILE).read_bytes() and b"a secret name" not in (new / FILE).read_bytes()


def test_a_new_folder_gets_a_copy_and_an_old_database_stays(cache: Path, tmp_path: Path) -> None:
    (cache / NAME).write_bytes(b"empty")
    for name in ("first", "two words", "100%20"):
        home = tmp_path / name
        in_folder(home, copy_empty_database)
        assert [file.read_bytes() for file in home.iterdir()] == [b"empty"]
        (home / FILE).write_bytes(b"used")
        in_folder(home, copy_empty_database)
        in_folder(home, keep_empty_database)
        assert (home / FILE).read_bytes() == b"used"
    assert [file.read_bytes() for file in cache.iterdir()] == [b"empty"]


def test_a_configured_database_is_left_alone(cache: Path, tmp_path: Path) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path}/my.db"
    own: dict[Any, Any] = {PREFECT_HOME: tmp_path, PREFECT_SERVER_DATABASE_CONNECTION_URL: url}
    (cache / NAME).write_bytes(b"empty")
    with temporary_settings(own):
        copy_empty_database()
    assert not (tmp_path / FILE).exists()
    (cache / NAME).rename(tmp_path / FILE)
    with temporary_settings(own):
        keep_empty_database()
    assert list(cache.iterdir()) == []


def test_a_database_that_another_process_makes_meanwhile_is_kept(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / NAME).write_bytes(b"empty")
    home, copy = tmp_path / "home", shutil.copy

    def late(*arguments: Any) -> Any:
        (home / FILE).write_bytes(b"used")
        return copy(*arguments)

    monkeypatch.setattr(shutil, "copy", late)
    in_folder(home, copy_empty_database)
    assert [file.read_bytes() for file in home.iterdir()] == [b"used"]


def test_a_failure_is_a_warning_and_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE).write_text("no database at all, but long enough to be looked at as one" * 9, encoding="utf-8")
    in_folder(tmp_path, keep_empty_database)
    assert "is kept for the next folder's Prefect server: file is not a database" in caplog.text
    assert list(cache.iterdir()) == []

    in_folder(tmp_path / "home", copy_empty_database)
    assert not (tmp_path / "home").exists()

    (cache / NAME).write_bytes(b"empty")
    (tmp_path / "home").write_text("a file where a folder should be", encoding="utf-8")
    in_folder(tmp_path / "home" / "below", copy_empty_database)
    assert "Not a directory" in caplog.text and "the server makes its own" in caplog.text

    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    caplog.clear()
    in_folder(tmp_path, keep_empty_database)
    assert "Not a directory" in caplog.text
