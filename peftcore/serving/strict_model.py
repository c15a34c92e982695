"""Base class of the models of requests."""

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """Model that refuses unknown fields and values of another type, such as "2" for 2."""

    model_config = ConfigDict(extra="forbid", strict=True)
