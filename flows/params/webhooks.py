"""Section `webhooks` of params.yaml: addresses that get the pipeline's events."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from flows.params.section import Section, invalid_value

EventType = Literal["candidate", "refusal", "promotion", "rollback", "drift", "failure"]
EVENT_TYPES: tuple[EventType, ...] = ("candidate", "refusal", "promotion", "rollback", "drift", "failure")


class Endpoint(Section):
    """One receiver. secret: where the signing secret is, never the secret itself."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s/?#]+\S*$")]
    events: list[EventType] = Field(default=list(EVENT_TYPES), min_length=1)
    secret: str = "env:PEFTCORE_WEBHOOK_SECRET"

    @field_validator("secret")
    @classmethod
    def _check_secret(cls, secret: str) -> str:
        kind, _, name = secret.partition(":")
        if not (kind == "file" and name) and not (kind == "env" and name.isidentifier()):
            raise invalid_value("give env:VARIABLE or file:PATH, which holds the secret, and not the secret itself")
        return secret


class Webhooks(Section):
    """Receivers of signed JSON events."""

    endpoints: list[Endpoint] = Field(default=[])

    @field_validator("endpoints")
    @classmethod
    def _check_urls(cls, endpoints: list[Endpoint]) -> list[Endpoint]:
        urls = [endpoint.url for endpoint in endpoints]
        if repeated := next((url for url in urls if urls.count(url) > 1), None):
            raise invalid_value(f"{repeated} is given twice; give one entry with all of its events")
        return endpoints
