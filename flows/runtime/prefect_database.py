"""An empty database for Prefect's server: a first server makes it, and new folders get a copy.

A server that finds no database runs all of Prefect's migrations, which takes 15 seconds or more. An empty database for
each version of Prefect is kept in `$XDG_CACHE_HOME/peftcore` (`~/.cache/peftcore`).
"""

import logging
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from flows.runtime.databases import sqlite_url

logger = logging.getLogger(__name__)

_FILE = "prefect.db"
_VERSION = "alembic_version"
"""Table with the number of the last migration: the only one with a row in an empty database."""


def copy_empty_database() -> None:
    """Put an empty database where Prefect's next server expects one, unless a database is configured or exists.

    Without it the server makes its own, so a failure is only a warning.
    """
    database = _default_database()
    if database is None or database.exists() or not (empty := _empty_database()).exists():
        return
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=database.parent) as folder:
            os.link(shutil.copy(empty, folder), database)  # unlike a renaming, it never replaces another's database
    except FileExistsError:
        logger.debug("another process has made %s", database)
    except OSError as error:
        logger.warning("no copy of an empty database for Prefect's server (%s); the server makes its own", error)


def keep_empty_database() -> None:
    """Keep a copy of the server's database without its rows, unless one is kept for this version of Prefect.

    The server must have started, so that its migrations are done. Without the copy the next folder's server makes its
    own database, so a failure is only a warning.
    """
    database, empty = _default_database(), _empty_database()
    if database is None or not database.exists() or empty.exists():
        return
    try:
        empty.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with TemporaryDirectory(dir=empty.parent) as folder:
            new = Path(folder, _FILE)
            _copy_without_rows(database, new)
            new.replace(empty)
    except (OSError, sqlite3.Error) as error:
        logger.warning("no empty database is kept for the next folder's Prefect server: %s", error)


def _copy_without_rows(database: Path, new: Path) -> None:
    with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(":memory:")) as copy:
        source.backup(copy)
        for (table,) in copy.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            if table != _VERSION:
                copy.execute(f'DELETE FROM "{table}"')
        copy.commit()
        copy.execute("VACUUM INTO ?", (str(new),))  # it also leaves out what the deleted rows said


def _default_database() -> Path | None:
    """Return the file of the server's database, which need not exist; None if another database is configured."""
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    database, url = settings.home / _FILE, settings.server.database.connection_url
    defaults = (f"sqlite+aiosqlite:///{database}", sqlite_url(database, "sqlite+aiosqlite"))
    return database if url is not None and url.get_secret_value() in defaults else None


def _empty_database() -> Path:
    """Return the file of the empty database for this version of Prefect, which need not exist."""
    import prefect

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "peftcore" / f"prefect-{prefect.__version__}.db"
