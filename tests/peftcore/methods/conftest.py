"""The trained LoRAs that tests of X-LoRA share."""

import pytest
from xlora_models import trained_loras


@pytest.fixture(scope="session")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return trained_loras(tmp_path_factory.mktemp("loras"), "llama")
