"""Who stands behind a version: whoever signed it, and whoever approved it."""

from flows.params import Gate
from flows.promotion.candidate import Candidate, Outcome
from flows.promotion.lineage import content_digest
from flows.promotion.signatures import VARIABLE
from peftcore.files import MANIFEST, sha256


def signature(candidate: Candidate, gate: Gate) -> Outcome:
    if gate.allowed_signers is None:
        return True, "not asked for"
    tag, found = f"{candidate.name}@{candidate.version}", candidate.signature
    if found is None or found.signer is None:
        why = found.problem if found else "it was not looked for"
        return False, (
            f"{tag} is signed by nobody of {gate.allowed_signers} ({why}); if it is to be trusted, delete the tag and "
            f"register it again with register.signing_key or {VARIABLE} set to a key of that list"
        )
    files = {path.name: sha256(path) for path in candidate.adapter.iterdir() if path.name != MANIFEST}
    if content_digest(files) != candidate.content:
        return False, f"what {found.signer} signed as {tag} is another adapter; run the pipeline again"
    return True, f"{found.signer} signed {tag}, with the digest of this adapter"


def approval(candidate: Candidate, gate: Gate) -> Outcome:
    if gate.approvals == 0:
        return True, "none asked for"
    by = f": {', '.join(candidate.approved_by)}" if candidate.approved_by else ""
    count = f"{len(candidate.approved_by)} of {gate.approvals}{by}"
    if len(candidate.approved_by) >= gate.approvals:
        return True, count
    return False, (
        f"{count}; people other than who registered it approve it with `peftcore approve {candidate.version} "
        "--note TEXT` (`peftcore registry fetch` gets the approvals of a remote)"
    )
