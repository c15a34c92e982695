"""SQLAlchemy's reading of URLs; Prefect depends on SQLAlchemy."""

from importlib import import_module
from typing import Any

make_url: Any = import_module("sqlalchemy.engine").make_url
