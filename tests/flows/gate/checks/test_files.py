"""The adapter's files: the registered ones, with weights that are numbers, and of the allowed size."""

from collections.abc import Callable
from dataclasses import replace

import numpy
import pytest
from gate_cases import judge, reason
from safetensors.numpy import save_file

from flows.gate.candidate import Candidate
from flows.gate.checks.files import adapter_size, finite_weights, manifest
from flows.params import Gate
from peftcore.files import MANIFEST, write_manifest


@pytest.mark.faults("flipped bit, truncated file, NaN")
def test_a_flipped_bit_is_named(make: Callable[..., Candidate]) -> None:
    candidate = make()
    path = candidate.adapter / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "adapter_model.safetensors differs from the registered file of v0.2.0" in reason(judge(candidate))


def test_new_weights_with_a_new_manifest_are_not_what_was_registered(make: Callable[..., Candidate]) -> None:
    candidate = make()
    save_file(
        {"layer.lora_A.weight": numpy.zeros((2, 4), numpy.float32)}, candidate.adapter / "adapter_model.safetensors"
    )
    write_manifest(candidate.adapter)
    assert reason(judge(candidate)).startswith("manifest: adapter_model.safetensors differs")


@pytest.mark.faults("flipped bit, truncated file, NaN")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(make: Callable[..., Candidate], value: float) -> None:
    assert reason(judge(make(weight=value))) == "finite weights: NaN or infinity in layer.lora_A.weight"


def test_an_adapter_over_its_size_is_refused(make: Callable[..., Candidate]) -> None:
    assert "MB, at most 0.0001" in reason(judge(make(), max_adapter_mb=0.0001))
    assert judge(make(), max_adapter_mb=10.0).passed


def test_a_version_without_the_digests_of_its_files_is_refused(make: Callable[..., Candidate]) -> None:
    passed, detail = manifest(replace(make(), files={}))
    assert not passed and "registered without the SHA-256 of its files" in detail


def test_a_manifest_that_was_rewritten_alone_is_named(make: Callable[..., Candidate]) -> None:
    candidate = make()
    sums = candidate.adapter / MANIFEST
    sums.write_text("\n".join(sums.read_text().splitlines()[:-1]) + "\n")
    passed, detail = manifest(candidate)
    assert not passed and detail.startswith(f"{MANIFEST} differs from the registered file of v0.2.0")


def test_a_folder_without_weights_is_refused(make: Callable[..., Candidate]) -> None:
    candidate = make()
    assert finite_weights(candidate) == (True, "1 tensors")
    (candidate.adapter / "adapter_model.safetensors").unlink()
    assert finite_weights(candidate) == (False, "the adapter folder holds no weights")


def test_of_many_bad_tensors_three_are_named(make: Callable[..., Candidate]) -> None:
    candidate = make()
    tensors = {f"layer{n}": numpy.full(2, numpy.nan if n else 1.0, numpy.float32) for n in range(6)}
    save_file(tensors, candidate.adapter / "adapter_model.safetensors")
    assert finite_weights(candidate) == (False, "NaN or infinity in layer1, layer2, layer3 and 2 more")


def test_the_size_is_of_all_files_in_units_of_a_million_bytes(make: Callable[..., Candidate]) -> None:
    candidate = make()
    total = sum(file.stat().st_size for file in candidate.adapter.iterdir())
    (candidate.adapter / "notes").mkdir()
    (candidate.adapter / "notes" / "README.md").write_bytes(bytes(2_500_000 - total))
    assert adapter_size(candidate, Gate()) == (True, "2.5 MB, no limit set")
    assert adapter_size(candidate, Gate(max_adapter_mb=2.5)) == (True, "2.5 MB, at most 2.5")
    assert adapter_size(candidate, Gate(max_adapter_mb=2.4)) == (False, "2.5 MB, at most 2.4")
