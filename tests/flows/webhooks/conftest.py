"""A repository, a receiver and parameters that name it."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from webhook_receiver import Receiver, receiving

from flows.params import Params

SECRET = "a secret of twenty bytes"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEFTCORE_WEBHOOK_SECRET", SECRET)
    root = tmp_path / "repository"
    root.mkdir()
    for arguments in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "--message=First"]):
        identity = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=root, check=True)
    return root


@pytest.fixture
def params_of(receiver: Receiver) -> Callable[..., Params]:
    def make(*urls: str, **options: Any) -> Params:
        endpoints = [{"url": url, **options} for url in urls or (receiver.url,)]
        return Params.model_validate({"webhooks": {"endpoints": endpoints}})

    return make
