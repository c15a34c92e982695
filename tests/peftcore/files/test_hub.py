"""Adapters on the hub: a name becomes a directory, and what goes wrong says what to do. No network: a local server."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
from hub_server import HubServer, use
from huggingface_hub import constants
from torch import nn

from peftcore import CheckpointError, ConfigError, LoraConfig, PeftConfig, PeftModel, XLoraConfig, get_peft_model
from peftcore.files import hub


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer().running() as server:
        use(server, tmp_path / "cache", monkeypatch)
        yield server


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def output(model: nn.Module) -> torch.Tensor:
    return model(torch.linspace(-1, 1, 12).view(2, 6)).detach()


# -- finding an adapter -----------------------------------------------------------------------------------------------


def test_an_adapter_is_loaded_by_its_hub_id(server: HubServer, adapter: Path) -> None:
    (adapter / "optimizer.pt").write_bytes(b"never sent")
    server.add("user/adapter", adapter)
    loaded = PeftModel.from_pretrained(net(), "user/adapter")
    (adapter / "optimizer.pt").unlink()
    torch.testing.assert_close(output(loaded), output(PeftModel.from_pretrained(net(), adapter)))
    assert sorted(server.downloaded()) == ["SHA256SUMS", "adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.slow
def test_the_environment_variable_names_the_server(server: HubServer, adapter: Path, tmp_path: Path) -> None:
    server.add("user/adapter", adapter)
    code = "from peftcore import PeftConfig; print(PeftConfig.from_pretrained('user/adapter').r)"
    environment = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HUB_CACHE": str(tmp_path / "other"),
        "HF_HUB_OFFLINE": "0",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "2\n"


def test_an_existing_directory_has_precedence(
    server: HubServer, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add("user/adapter", adapter)
    (tmp_path / "user").mkdir()
    adapter.rename(tmp_path / "user" / "adapter")
    monkeypatch.chdir(tmp_path)
    PeftModel.from_pretrained(net(), "user/adapter")
    assert server.requests == []
    with pytest.warns(UserWarning, match="revision='v2' has no effect on the local directory"):
        PeftModel.from_pretrained(net(), "user/adapter", revision="v2")


def test_revisions_and_subfolders(server: HubServer, adapter: Path, tmp_path: Path) -> None:
    other = get_peft_model(net(), LoraConfig(r=3, target_modules=["0"]))
    other.save_pretrained(tmp_path / "other")
    server.add("user/adapter", adapter)
    server.add("user/adapter", tmp_path / "other", "experiment", inside="snapshots/er/")
    assert PeftConfig.from_pretrained("user/adapter").ranks() == [2]
    assert PeftConfig.from_pretrained("user/adapter", revision="experiment", subfolder="snapshots/er").ranks() == [3]
    commit = server.repositories["user/adapter"].branches["experiment"]
    loaded = PeftModel.from_pretrained(net(), "user/adapter", revision=commit, subfolder="snapshots/er")
    assert loaded.adapter_ranks() == {"0": 3}
    loaded.load_adapter(tmp_path, "local", subfolder="other")
    loaded.load_adapter("user/adapter", "published", revision="main")
    assert loaded.adapter_ranks("local") == {"0": 3} and loaded.adapter_ranks("published") == {"0": 2, "1": 2}


def test_all_files_are_of_one_commit(server: HubServer, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The repository gets another commit between the configuration and the weights."""
    repository = server.add("user/adapter", adapter)
    first = repository.branches["main"]
    download = huggingface_hub.hf_hub_download

    def then_commit(*args: Any, **kwargs: Any) -> str:
        path = download(*args, **kwargs)
        repository.commit({**repository.files(first), "adapter_model.safetensors": b"newer"})
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", then_commit)
    assert f"/{first}" in str(hub.adapter_directory("user/adapter"))
    PeftModel.from_pretrained(net(), "user/adapter", revision=first)


def test_a_cached_adapter_needs_no_network(
    server: HubServer, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add("user/adapter", adapter)
    expected = output(PeftModel.from_pretrained(net(), "user/adapter"))
    assert all(file.is_symlink() for file in hub.adapter_directory("user/adapter").iterdir())
    server.requests.clear()
    torch.testing.assert_close(
        output(PeftModel.from_pretrained(net(), "user/adapter", local_files_only=True)), expected
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    torch.testing.assert_close(output(PeftModel.from_pretrained(net(), "user/adapter")), expected)
    assert server.requests == []
    with pytest.raises(CheckpointError, match=r"no directory 'user/other'.*without HF_HUB_OFFLINE=1"):
        PeftModel.from_pretrained(net(), "user/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError, match="without local_files_only=True"):
        PeftModel.from_pretrained(net(), "user/adapter", local_files_only=True, cache_dir=tmp_path / "empty")


def test_what_hf_peft_has_cached_is_found(server: HubServer, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF PEFT downloads no manifest."""
    server.add("user/adapter", adapter)
    expected = output(peft.PeftModel.from_pretrained(net(), "user/adapter"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    torch.testing.assert_close(output(PeftModel.from_pretrained(net(), "user/adapter")), expected)


def test_the_experts_of_x_lora_may_be_hub_ids(server: HubServer, adapter: Path) -> None:
    server.add("user/expert", adapter)
    config = XLoraConfig(hidden_size=6, adapters={"1": "user/expert", "0": str(adapter)})
    local, downloaded = config.directories()
    assert local == adapter
    weights = "adapter_model.safetensors"
    assert downloaded != adapter and (downloaded / weights).read_bytes() == (adapter / weights).read_bytes()


def test_the_token_opens_private_and_gated_repositories(server: HubServer, adapter: Path) -> None:
    repository = server.add("user/adapter", adapter)
    repository.private = True
    with pytest.raises(CheckpointError, match=r"no directory 'user/adapter' here, and no repository.*hf auth login"):
        PeftModel.from_pretrained(net(), "user/adapter")
    PeftModel.from_pretrained(net(), "user/adapter", token=server.token)
    repository.private, repository.gated = False, True
    for token in (None, "hf_wrong"):
        with pytest.raises(CheckpointError, match=r"user/adapter is gated: accept its conditions at http.*token="):
            PeftConfig.from_pretrained("user/adapter", token=token, force_download=True)
    PeftConfig.from_pretrained("user/adapter", token=server.token, force_download=True)
    with pytest.warns(FutureWarning, match="use_auth_token is deprecated"):
        PeftConfig.from_pretrained("user/adapter", use_auth_token=server.token, force_download=True)


def test_unknown_names_say_what_to_do(server: HubServer, adapter: Path, tmp_path: Path) -> None:
    server.add("user/adapter", adapter)
    with pytest.raises(CheckpointError, match="no directory 'user/nothing' here, and no repository of this name"):
        PeftModel.from_pretrained(net(), "user/nothing")
    with pytest.raises(CheckpointError, match="has no revision 'v9'; give a branch, a tag or a commit"):
        PeftModel.from_pretrained(net(), "user/adapter", revision="v9")
    with pytest.raises(CheckpointError, match=r"no adapter_config.json in user/adapter, subfolder 'none'"):
        PeftModel.from_pretrained(net(), "user/adapter", subfolder="none")
    for absent in ("./user/adapter", "a/b/c", tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=r"no adapter_config\.json in"):
            PeftModel.from_pretrained(net(), absent)
    with pytest.raises(TypeError, match="a directory or a hub id"):
        PeftModel.from_pretrained(net(), None)  # type: ignore[arg-type]
    assert server.downloaded() == []


def test_a_repository_without_weights_or_with_a_pickle(server: HubServer, adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    server.add("user/adapter", adapter)
    with pytest.raises(CheckpointError, match="a configuration without weights"):
        PeftModel.from_pretrained(net(), "user/adapter")
    (adapter / "adapter_model.bin").write_bytes(content)
    server.add("user/adapter", adapter)
    with pytest.raises(CheckpointError, match=r"but adapter_model.bin.*convert_bin user/adapter NEW_DIRECTORY"):
        PeftModel.from_pretrained(net(), "user/adapter")
    assert "adapter_model.bin" not in server.downloaded()


def test_a_download_that_ends_half_way_and_damage_in_the_cache(
    server: HubServer, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the hub client's attempts
    server.add("user/adapter", adapter)
    server.broken.add("adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"user/adapter: .*run it again"):
        PeftModel.from_pretrained(net(), "user/adapter")
    server.broken.clear()
    PeftModel.from_pretrained(net(), "user/adapter")
    weights = hub.adapter_directory("user/adapter") / "adapter_model.safetensors"
    weights.resolve().write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"SHA256SUMS.*downloaded from the hub, 'user/adapter'.*force_download"):
        PeftModel.from_pretrained(net(), "user/adapter")
    PeftModel.from_pretrained(net(), "user/adapter", force_download=True)


def test_no_network_and_a_broken_server(server: HubServer, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("user/adapter", adapter)
    server.status = 418
    with pytest.raises(CheckpointError, match="answered with status 418"):
        PeftConfig.from_pretrained("user/adapter")
    server.status = 403
    with pytest.raises(CheckpointError, match=r"refuses access \(status 403\)"):
        PeftConfig.from_pretrained("user/adapter")
    with pytest.raises(CheckpointError, match=r"127.0.0.1:9 gave no answer \(.*check the network"):
        monkeypatch.setattr("time.sleep", lambda _: None)
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
        )
        PeftConfig.from_pretrained("user/adapter")


def test_options_that_cannot_be_followed_are_errors(server: HubServer, adapter: Path) -> None:
    for option, advice in {"proxies": "HTTPS_PROXY", "resume_download": "always resumed", "dry_run": "files"}.items():
        with pytest.raises(ConfigError, match=f"{option} is not supported; .*{advice}"):
            options: Any = {option: True}
            PeftConfig.from_pretrained(adapter, **options)
    with pytest.raises(
        TypeError, match=r"PeftConfig.from_pretrained\(\) has no option 'revison'; did you mean 'revision'"
    ):
        PeftConfig.from_pretrained(adapter, revison="v1")
    with pytest.raises(CheckpointError, match="force_download"):
        PeftConfig.from_pretrained("user/adapter", force_download=True, local_files_only=True)


def test_every_option_of_hf_hub_download_is_known() -> None:
    import inspect

    parameters = inspect.signature(huggingface_hub.hf_hub_download).parameters
    assert parameters.keys() - {"repo_id", "filename", "dry_run"} == hub.OPTIONS


def test_files_that_only_the_manifest_names_are_not_missed(server: HubServer, adapter: Path) -> None:
    """A checkpoint's manifest names files that a reader of the adapter does not download."""
    manifest = adapter / "SHA256SUMS"
    manifest.write_text(manifest.read_text() + f"{'0' * 64}  trainer_state.json\n")
    server.add("user/adapter", adapter)
    PeftModel.from_pretrained(net(), "user/adapter")


# -- uploading --------------------------------------------------------------------------------------------------------


def test_an_adapter_is_pushed_with_its_card_and_loaded_back(server: HubServer, adapter: Path) -> None:
    model = PeftModel.from_pretrained(net(), adapter)
    model.add_adapter("other", LoraConfig(r=4, target_modules=["0"]))
    info = model.push_to_hub("new", token=server.token, private=True, commit_message="first", tags=["mine"])
    repository = server.repositories["me/new"]
    assert info.startswith(f"{server.url}/me/new/commit/") and repository.private
    assert repository.messages[-1] == "first"
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "other/adapter_config.json"} <= set(
        repository.files()
    )
    card = repository.files()["README.md"].decode()
    assert "library_name: peft" in card and "- mine" in card
    loaded = PeftModel.from_pretrained(net(), "me/new", token=server.token)
    torch.testing.assert_close(output(loaded), output(model))
    loaded.load_adapter("me/new", "other", subfolder="other", token=server.token)
    assert loaded.adapter_ranks("other") == {"0": 4}


def test_a_second_push_keeps_the_card_and_removes_an_outdated_encoder(server: HubServer, adapter: Path) -> None:
    repository = server.add("me/new", adapter)
    files = {"README.md": b"---\nlicense: mit\n---\nmy words", "prompt_encoder.safetensors": b"old", "notes.txt": b"n"}
    repository.commit({**repository.files(), **files})
    info = hub.push_directory(adapter, "me/new", token=server.token, revision="next", tags=["t"])
    pushed = repository.files("next")
    assert (
        b"my words" in pushed["README.md"] and b"license: mit" in pushed["README.md"] and b"- t" in pushed["README.md"]
    )
    assert "prompt_encoder.safetensors" not in pushed and pushed["notes.txt"] == b"n"
    assert "prompt_encoder.safetensors" in repository.files("main") and info.pr_url is None
    request = hub.push_directory(adapter, "me/new", token=server.token, create_pr=True, commit_description="why")
    assert request.pr_url == f"{server.url}/me/new/discussions/1"


def test_a_configuration_is_pushed(server: HubServer) -> None:
    LoraConfig(r=5, target_modules=["0"]).push_to_hub("me/config", token=server.token)
    assert json.loads(server.repositories["me/config"].files()["adapter_config.json"])["r"] == 5
    assert PeftConfig.from_pretrained("me/config").ranks() == [5]
    with pytest.raises(ConfigError, match="max_shard_size='1MB'"):
        LoraConfig().push_to_hub("me/config", token=server.token, max_shard_size="1MB")


def test_uploads_that_the_hub_refuses(
    server: HubServer, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match=r"refuses the upload \(status 401\).*may write"):
        hub.push_directory(adapter, "me/new", token="hf_wrong")
    with pytest.raises(CheckpointError, match="give the directory that save_pretrained wrote"):
        hub.push_directory(tmp_path, "me/new", token=server.token)
    with pytest.raises(CheckpointError, match="give a hub id such as 'owner/name'"):
        hub.push_directory(adapter, "a/b/c", token=server.token)
    server.status = 507
    with pytest.raises(CheckpointError, match="failed with status 507"):
        hub.push_directory(adapter, "me/new", token=server.token)
    server.status = None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE=1 is set"):
        hub.push_directory(adapter, "me/new", token=server.token)
    assert server.repositories == {}
