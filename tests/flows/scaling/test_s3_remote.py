"""A DVC remote on S3 (moto's server on 127.0.0.1): versions go there and come back, and a damaged object does not."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.errors import RepositoryError
from flows.runtime.project import dvc

pytest.importorskip("dvc_s3", reason="needs `pip install 'peftcore[scale]'`")
boto3 = pytest.importorskip("boto3")

SECRET = "a-secret-of-this-test"
CONFIG = """\
[core]
    analytics = false
    check_update = false
    remote = s3
['remote "s3"']
    url = s3://adapters/store
    endpointurl = {url}
    verify = true
"""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of an S3 that keeps everything in memory."""
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bucket of its own, with credentials in the environment."""
    for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": SECRET, "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    bucket = boto3.resource("s3", endpoint_url=server).Bucket("adapters")
    bucket.create()
    yield bucket
    bucket.objects.all().delete()
    bucket.delete()


@pytest.fixture
def on_s3(project: Any, server: str, bucket: Any) -> Any:
    """The tiny repository with its remote on S3, committed."""
    (project.root / ".dvc" / "config").write_text(CONFIG.format(url=server))
    params = project.paths.params
    params.write_text(params.read_text().replace("remote: local", "remote: s3"))
    project.git("commit", "--quiet", "--all", "--message=Store on S3")
    return project


def another_clone(project: Any, folder: Path) -> Path:
    """A clone without a cache, as another machine has it."""
    project.git("clone", "--quiet", str(project.root), str(folder))
    shutil.copyfile(project.root / "dvc.lock", folder / "dvc.lock")
    return folder


@pytest.mark.slow
def test_a_registered_version_is_got_from_s3(on_s3: Any, bucket: Any, tmp_path: Path) -> None:
    on_s3.register()
    assert sum(1 for _ in bucket.objects.filter(Prefix="store/files/md5/")) > 0
    shutil.rmtree(on_s3.root / ".dvc" / "cache")
    got = tmp_path / "got"
    dvc(tmp_path, "artifacts", "get", str(on_s3.root), "docstrings", "--rev", "v0.1.0", "--out", str(got))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (got / name).read_bytes() == (on_s3.paths.adapter / name).read_bytes()


@pytest.mark.slow
def test_a_damaged_object_is_found_out_when_it_is_pulled(on_s3: Any, bucket: Any, tmp_path: Path) -> None:
    dvc(on_s3.root, "push", "--quiet")
    adapter = (on_s3.paths.adapter / "adapter_model.safetensors").read_bytes()
    (held,) = [one for one in bucket.objects.all() if one.get()["Body"].read() == adapter]
    held.put(Body=adapter[:-1] + bytes([adapter[-1] ^ 1]))
    clone = another_clone(on_s3, tmp_path / "clone")
    with pytest.raises(RepositoryError, match=r"(?s)artifacts/adapter"):
        dvc(clone, "pull")
    assert not (clone / "artifacts" / "adapter" / "adapter_model.safetensors").exists()
    held.put(Body=adapter)
    dvc(clone, "pull")
    assert (clone / "artifacts" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_credentials_of_this_machine_alone_are_never_committed(
    on_s3: Any, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    with pytest.raises(RepositoryError, match=r"(?i)credentials"):
        dvc(on_s3.root, "push")
    for key, value in {"access_key_id": "test", "secret_access_key": SECRET}.items():
        dvc(on_s3.root, "remote", "modify", "--local", "s3", key, value)
    dvc(on_s3.root, "push")
    assert list(bucket.objects.filter(Prefix="store/files/md5/"))
    project_git = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=all"], cwd=on_s3.root, capture_output=True, text=True
    )
    assert "config.local" not in project_git.stdout
    assert SECRET not in on_s3.git("grep", "-I", "--untracked", "-e", "endpointurl", "-e", SECRET)
