"""URLs of SQLite files, as SQLAlchemy reads them."""

from pathlib import Path
from urllib.parse import quote


def sqlite_url(file: Path, driver: str = "sqlite") -> str:
    """Return the URL of a SQLite file. A path may have signs with a meaning in URLs, such as `%20` or `?`.

    Args:
        file: Path of the file, which need not exist.
        driver: SQLAlchemy's dialect and driver, such as sqlite+aiosqlite.
    """
    return f"{driver}:///{quote(str(file))}"
