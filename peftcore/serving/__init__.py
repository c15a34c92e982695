"""Server of one base model with many adapters, with OpenAI's HTTP API. README.md explains the design."""

# ruff: noqa: E402 (the check has to come before the imports that need the packages)
from peftcore.errors import require_extra

require_extra("serve", "peftcore.serving", "fastapi", "jinja2", "prometheus_client", "uvicorn")

from peftcore.serving.catalog import check_servable
from peftcore.serving.limits import Limits
from peftcore.serving.middleware import checked_keys
from peftcore.serving.own_thread import in_own_thread
from peftcore.serving.recording import Recorder, Records
from peftcore.serving.redaction import BUILT_IN as REDACTIONS
from peftcore.serving.redaction import Redaction, Rule
from peftcore.serving.server import serve
from peftcore.serving.service import Service, load_base, make_service

__all__ = [
    "REDACTIONS",
    "Limits",
    "Recorder",
    "Records",
    "Redaction",
    "Rule",
    "Service",
    "check_servable",
    "checked_keys",
    "in_own_thread",
    "load_base",
    "make_service",
    "serve",
]
