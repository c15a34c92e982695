"""One base model with many adapters behind OpenAI's HTTP interface; README.md says why it is built so."""

from peftcore.serving.catalog import check_servable
from peftcore.serving.guard import checked_keys
from peftcore.serving.limits import Limits
from peftcore.serving.server import serve
from peftcore.serving.service import Service, load_base, make_service

__all__ = ["Limits", "Service", "check_servable", "checked_keys", "load_base", "make_service", "serve"]
