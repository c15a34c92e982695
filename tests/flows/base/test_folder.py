"""A base's folder: its files are checked, and its padding is the tokenizer's."""

from pathlib import Path

import pytest

from flows.base.folder import check_base, load_tokenizer, padding_id
from flows.errors import BaseModelError
from peftcore.files import sha256


def test_the_identity_is_that_of_the_manifest(tiny_base: Path) -> None:
    assert check_base(tiny_base) == sha256(tiny_base / "SHA256SUMS")


@pytest.mark.faults("flipped bit, truncated file, NaN")
def test_a_damaged_or_absent_base_is_refused(tiny_base: Path) -> None:
    (tiny_base / "config.json").write_text("{}")
    with pytest.raises(BaseModelError, match=r"config\.json is damaged"):
        check_base(tiny_base)
    with pytest.raises(BaseModelError, match="run `peftcore stage fetch`"):
        check_base(tiny_base / "nothing")
    with pytest.raises(BaseModelError, match="run `peftcore stage fetch`"):
        load_tokenizer(tiny_base / "nothing")


def test_padding_is_the_tokenizers_own_or_its_end(tiny_base: Path) -> None:
    tokenizer = load_tokenizer(tiny_base)
    assert padding_id(tokenizer) == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert padding_id(tokenizer) == tokenizer.eos_token_id
