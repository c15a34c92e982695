"""Downloads run in a process of their own, and a failed one keeps the downloader's last words."""

import pytest

from flows.base import hub
from flows.base.hub import DownloadError, download, run_downloader


def test_the_hub_is_allowed_there_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run_downloader("-c", "import os; print(os.environ['HF_HUB_OFFLINE'])") == "0\n"


def test_a_failure_tells_the_error_line_rather_than_the_advice_after_it() -> None:
    code = "import sys; sys.exit('ERROR: No matching distribution found for x==1.\\nnotice: a newer pip is there')"
    with pytest.raises(DownloadError, match=r"^No matching distribution found for x==1$"):
        run_downloader("-c", code)


def test_name_and_revision_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(hub, "run_downloader", lambda *given: asked.append(given[2:]) or "progress\n/snapshot\n")
    assert str(download("hub:a/b@v1", "model")) == "/snapshot"
    download("hub:c/d", "dataset")
    assert asked == [("a/b", "v1", "model"), ("c/d", "", "dataset")]
