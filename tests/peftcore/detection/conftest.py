"""Detected architectures of the tiny models."""

import pytest
from detection_models import CASES, build

from peftcore.detection import Architecture, detect


@pytest.fixture(scope="session")
def architectures() -> dict[str, Architecture]:
    return {family: detect(build(family, case[0], **case[1])) for family, case in CASES.items()}
