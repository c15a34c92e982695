"""A lineage record is checked before it is used; `tests/security/test_records.py` forges whole versions."""

from typing import Any

import pytest
from pydantic import ValidationError

from flows.registry.record import check_record

DIGEST = "0123456789abcdef" * 4


def record(**changes: Any) -> dict[str, Any]:
    sides = {side: {"loss": 2.5, "rouge_l": 0.3} for side in ("base", "adapter")}
    return {
        "name": "docstrings",
        "version": "v0.1.0",
        "created": "2026-11-26T10:00:00+00:00",
        "git": {"commit": "c" * 40, "uncommitted": []},
        "adapter": {"content": DIGEST, "files": {"adapter_model.safetensors": DIGEST}},
        "evidence": {"artifacts/evaluation/metrics.json": DIGEST},
        "evaluation_set": "e" * 64,
        "base_model": "b" * 64,
        "dvc": {"artifacts/data": "d1.dir"},
        "params": {"data": {}, "method": {}, "train": {}},
        "metrics": sides,
        "software": {"python": "3.11.7"},
        **changes,
    }


def test_a_record_with_keys_of_a_later_release_is_returned_as_it_is() -> None:
    later = record(mood="good", metrics=record()["metrics"] | {"novelty": [1]})
    assert check_record(later) is later
    assert later == record(mood="good", metrics=record()["metrics"] | {"novelty": [1]})


@pytest.mark.parametrize("key", record())
def test_a_record_without_one_of_its_parts_is_refused_by_the_parts_name(key: str) -> None:
    partial = record()
    del partial[key]
    with pytest.raises(ValidationError, match=rf"\n{key}\n  Field required"):
        check_record(partial)


@pytest.mark.parametrize("part", ["evidence", "dvc", "adapter"])
@pytest.mark.parametrize("name", ["", "/etc/passwd", "../outside", "artifacts/../../outside", "..", "a\\b"])
def test_a_name_that_leads_out_of_the_folder_is_refused(part: str, name: str) -> None:
    forged = {"content": DIGEST, "files": {name: DIGEST}} if part == "adapter" else {name: DIGEST}
    with pytest.raises(ValidationError, match="leads out of its folder; names are relative and without"):
        check_record(record(**{part: forged}))


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "g" * 64, "A" * 64, f"{'0' * 64}\n"])
def test_what_is_no_hexadecimal_sha256_is_no_digest(digest: str) -> None:
    with pytest.raises(ValidationError, match="should match pattern"):
        check_record(record(evidence={"artifacts/merge.json": digest}))
