"""The identity of a server's base: its files, and the storage of its weights."""

from pathlib import Path
from typing import Any

import pytest

from flows.errors import RegistryError
from flows.params import Params, Quantization
from flows.serving.served_base import ServedBase, check_generates, load_given_base
from peftcore.errors import ConfigError

ONE, OTHER, MANIFEST = "1" * 64, "2" * 64, "9" * 64


def record(**changes: Any) -> dict[str, Any]:
    return {
        "name": "docstrings",
        "version": "v0.1.0",
        "base_model": ONE,
        "base_manifest": MANIFEST,
        "params": Params().model_dump(),
        **changes,
    }


def test_a_versions_base_is_that_of_its_evaluation() -> None:
    params = Params.model_validate({"quantization": {"storage": "int8", "compute_dtype": "float16"}})
    base = ServedBase.of_record(record(params=params.model_dump()))
    assert base == ServedBase(ONE, params.quantization, MANIFEST)
    assert base.is_same(ServedBase.of_record(record(params=params.model_dump())))


@pytest.mark.parametrize(
    "other",
    [
        ServedBase(OTHER, Quantization(), MANIFEST),
        ServedBase(ONE, Quantization(storage="int8"), MANIFEST),
        ServedBase(ONE, Quantization(double_quant=False), MANIFEST),
        ServedBase(ONE, Quantization(compute_dtype="float32"), MANIFEST),
    ],
    ids=["other files", "storage", "double quantisation", "dtype"],
)
def test_other_files_or_another_storage_is_another_base(other: ServedBase) -> None:
    base = ServedBase.of_record(record(params={"quantization": {"compute_dtype": "bfloat16"}}))
    assert base.is_same(base)
    assert not base.is_same(other) and not other.is_same(base)


def test_a_base_computed_in_the_type_that_the_machine_is_fast_in_fits_every_type() -> None:
    automatic = ServedBase(ONE, Quantization(), MANIFEST)
    for dtype in ("bfloat16", "float32"):
        given = ServedBase(ONE, Quantization(compute_dtype=dtype), MANIFEST)  # type: ignore[arg-type]
        assert automatic.is_same(given) and given.is_same(automatic)
    assert not automatic.is_same(ServedBase(ONE, Quantization(storage="int8"), MANIFEST))


def test_a_record_of_an_earlier_release_names_the_base_by_its_manifest() -> None:
    earlier = ServedBase.of_record(record(base_model=MANIFEST, base_manifest=None))
    served = ServedBase(ONE, Quantization(), MANIFEST)
    assert served.is_same(earlier) and earlier.is_same(served)
    assert not ServedBase(ONE, Quantization(), OTHER).is_same(earlier)


def test_the_same_model_saved_by_another_release_of_transformers_is_the_same_base() -> None:
    """Only the manifest differs then: the configuration files name the release."""
    assert ServedBase(ONE, Quantization(), MANIFEST).is_same(ServedBase(ONE, Quantization(), OTHER))


@pytest.mark.parametrize("params", [{}, {"quantization": None}, {"quantization": {"storage": "nf3"}}])
def test_a_record_that_does_not_state_the_storage_is_refused(params: dict[str, Any]) -> None:
    with pytest.raises(RegistryError, match=r"record of docstrings v0\.1\.0 does not state how its base was stored"):
        ServedBase.of_record(record(params=params))


def test_a_base_is_told_by_its_digest_and_by_what_it_computes_in() -> None:
    assert str(ServedBase(ONE, Quantization(storage="none"))) == "base 111111111111 as auto"
    assert str(ServedBase(ONE, Quantization(compute_dtype="float16"))) == (
        "base 111111111111 as dequantised nf4 in float16"
    )


def test_a_model_that_generates_no_text_is_not_served(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"the project's train\.objective is embedding, and only models that answer chats are served"
    ):
        check_generates("embedding", "the project's train.objective is embedding")
    check_generates("sft", "")
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    with pytest.raises(
        ConfigError, match=r"holds an encoder or a classifier, and only models that answer chats are served"
    ):
        load_given_base(tmp_path, "auto")
