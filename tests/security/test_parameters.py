"""Hostile params.yaml, and names that would reach git, DVC or a shell as something else."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from flows.errors import ParamsError, RepositoryError
from flows.params import load_params
from flows.registry.registry import Registry
from flows.runtime.git import Git


def said(tmp_path: Path, text: str) -> str:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ParamsError) as refused:
        load_params(tmp_path / "params.yaml")
    return str(refused.value)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdef", "bcdefg", strict=True)
)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (LAUGHS, "makes more than 10,000 values"),
        ("a: &a [*a]", "nested too deeply"),
        ("a: " + "[" * 50_000, "nested too deeply"),
        ("a: x\n" * 100_000, "more than 262,144 bytes"),
        ("a: !!python/object/apply:os.system ['touch ran']", "not valid YAML"),
        ("a: !!python/name:os.system", "not valid YAML"),
        ("a: 2001-99-99", "not valid YAML"),
        ("project: {seed: !!int x}", "not valid YAML"),
        ("project: {seed: " + "9" * 5000 + "}", "params.yaml"),
        ("? [a]\n: 1", "params.yaml"),
    ],
)
def test_yaml_that_is_a_bomb_or_asks_for_code(text: str, what: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert what in said(tmp_path, text)
    assert not (tmp_path / "ran").exists()


def test_a_device_is_no_parameters(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").symlink_to("/dev/zero")
    with pytest.raises(ParamsError, match="not an ordinary file"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("key", ["project.name", "gate.stage", "register.remote"])
@pytest.mark.parametrize(
    "name", ["-x", "--help", "a b", "a;b", "$(b)", "a\n", "a\nb", "../a", "a/../b", "a@v1", "a#b", "ä#"]
)
def test_no_name_is_an_option_a_path_or_a_line_of_its_own(key: str, name: str, tmp_path: Path) -> None:
    section, field = key.split(".")
    assert key in said(tmp_path, f"{section}: {{{field}: {json.dumps(name)}}}\n")


SECRETS = {
    "Hugging Face": "hf_" + "aB3" * 11,
    "W&B": "0123456789abcdef" * 2 + "01234567",
    "AWS": "AKIA" + "ABCD1234" * 2,
    "GitHub": "ghp_" + "a1B2" * 9,
    "API key": "sk-" + "a1B2" * 10,
    "secret of webhooks": "whsec_" + "aB3/" * 8,
    "password": "https://me:hunter2@example.org/x",
    "private key": "-----BEGIN OPENSSH PRIVATE KEY-----",
}


@pytest.mark.parametrize("what", SECRETS)
@pytest.mark.parametrize(
    "text", ["data:\n  system_prompt: say {}\n", "x: [1, '{}']\n", "method: {{options: {{a: '{}'}}}}\n"]
)
def test_a_secret_is_refused_by_its_line_and_not_said_again(what: str, text: str, tmp_path: Path) -> None:
    answer = said(tmp_path, text.format(json.dumps(SECRETS[what]).strip('"')))
    assert what in answer and SECRETS[what] not in answer and answer.startswith("params.yaml:")


@pytest.mark.parametrize("source", ["hub:a/b@" + "0123456789abcdef" * 2 + "01234567", f"wheel:a==1#sha256={'0' * 64}"])
def test_a_hash_is_no_secret(source: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(f"base: {{source: '{source}'}}\n")
    assert load_params(tmp_path / "params.yaml").base.source == source


# -- git ---------------------------------------------------------------------------------------------------------------


def hostile_tag(project: Any, name: str, body: bytes, tagger: str = "tagger E <e@x> 1700000000 +0000\n") -> None:
    """A tag object as no `git tag` would make it."""
    head = project.git("rev-parse", "HEAD").strip()
    content = f"object {head}\ntype commit\ntag {name}\n{tagger}\n".encode() + body
    command = ["git", "hash-object", "-t", "tag", "-w", "--stdin", "--literally"]
    made = subprocess.run(command, cwd=project.root, input=content, capture_output=True, check=True)
    project.git("update-ref", f"refs/tags/{name}", made.stdout.decode().strip())


def test_a_tags_message_makes_no_other_tags(project: Any) -> None:
    head = project.git("rev-parse", "HEAD").strip()
    fields = ["tag", "docstrings#champion#9", head, "1800000000", "<e@x>", "docstrings#champion#9", "", "forged"]
    forged = "\x1e\n" + "\x1f".join(fields) + "\x1e\x00\n" + "\x00".join([*fields, ""])
    hostile_tag(project, "docstrings@v0.1.0", forged.encode())
    assert [tag.name for tag in Git(project.root).tags("docstrings@*", "docstrings#*")] == ["docstrings@v0.1.0"]
    assert Registry(Git(project.root), "docstrings").stages() == {}


def test_a_tag_of_bytes_without_a_tagger_is_read_all_the_same(project: Any) -> None:
    hostile_tag(project, "docstrings@v0.1.0", b"\xff\xfe\n", tagger="")
    (version,) = Registry(Git(project.root), "docstrings").versions()
    assert version.number == "v0.1.0" and version.created == 0


@pytest.mark.parametrize("remote", ["--receive-pack=touch ran;", "ext::sh -c touch% ran", "--exec=touch ran"])
def test_a_remote_is_no_option_and_no_command(remote: str, project: Any) -> None:
    hostile_tag(project, "docstrings@v0.1.0", b"a\n")
    with pytest.raises(RepositoryError):
        Git(project.root).push_tags(remote, ["docstrings@v0.1.0"])
    assert not (project.root / "ran").exists()
