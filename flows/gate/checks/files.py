"""Checks of the adapter's files: allowed files only, the registered content, finite weights, the size."""

from flows.gate.candidate import Candidate, CheckResult
from flows.params import Gate
from flows.registry.adapter_files import foreign_files, non_finite_tensors
from peftcore.files import read_manifest, sha256


def allowed_files(candidate: Candidate) -> CheckResult:
    """Check that the adapter folder holds safetensors weights, configuration, tokenizer, notes and manifest alone."""
    foreign = foreign_files(candidate.adapter)
    if foreign:
        return False, f"{', '.join(foreign)} may not be in an adapter folder; only safetensors weights are allowed"
    return True, "safetensors weights, their configuration and notes only"


def manifest(candidate: Candidate) -> CheckResult:
    """Check that every file has the SHA-256 of the version's record."""
    if not candidate.files:
        return False, "the version was registered without the SHA-256 of its files; register it again"
    folder = candidate.adapter
    # the folder's own manifest could have been rewritten with its files; the record could not
    damaged = [
        name
        for name, digest in candidate.files.items()
        if not (folder / name).is_file() or sha256(folder / name) != digest
    ]
    if damaged or read_manifest(folder) != dict(candidate.files):
        names = ", ".join(damaged) or "SHA256SUMS"
        return False, f"{names} differs from the registered file of {candidate.version}; run the pipeline again"
    return True, f"{len(candidate.files)} files have their registered SHA-256"


def finite_weights(candidate: Candidate) -> CheckResult:
    """Check that there are weights, and that none is NaN or infinite."""
    bad, count = non_finite_tensors(candidate.adapter)
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        return False, f"NaN or infinity in {', '.join(bad[:3])}{more}"
    if count == 0:
        return False, "the adapter folder holds no weights"
    return True, f"{count} tensors"


def adapter_size(candidate: Candidate, gate: Gate) -> CheckResult:
    """Check the total size of the adapter's files (MB, 10^6 bytes)."""
    size = sum(file.stat().st_size for file in candidate.adapter.rglob("*") if file.is_file()) / 1e6
    if gate.max_adapter_mb is None:
        return True, f"{size:.1f} MB, no limit set"
    return size <= gate.max_adapter_mb, f"{size:.1f} MB, at most {gate.max_adapter_mb:g}"
