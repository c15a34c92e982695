"""Who stands behind a version: whoever signed it, whoever approved it, and whether its stage was taken back.

Without `gate.allowed_signers` an approval is an e-mail that git was told, which anybody can set, so it proves nothing.
"""

from flows.gate.candidate import Candidate, Outcome
from flows.params import Gate
from flows.registry.lineage import content_digest
from flows.registry.signatures import VARIABLE
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
    count, note = f"{len(candidate.approved_by)} of {gate.approvals}{by}", ""
    if gate.allowed_signers is None and candidate.approved_by:
        note = "; unsigned e-mails prove nothing, gate.allowed_signers asks for signatures"
    elif candidate.unsigned_approvals:
        note = f"; {candidate.unsigned_approvals} more are signed by nobody of {gate.allowed_signers} and do not count"
    if len(candidate.approved_by) >= gate.approvals:
        return True, f"{count}{note}"
    return False, (
        f"{count}; people other than who registered it approve it with `peftcore approve {candidate.version} "
        f"--note TEXT` (`peftcore registry fetch` gets the approvals of a remote){note}"
    )


def not_taken_back(candidate: Candidate, gate: Gate) -> Outcome:
    """A stage that somebody took from this adapter is given to it again only by an act of somebody's."""
    if candidate.taken_back is None:
        return True, "it was not"
    if candidate.again:
        return True, f"{candidate.taken_back}, and it was asked for again"
    return False, (
        f"{candidate.taken_back}; if it is good after all, judge it again with `peftcore promote --version "
        f"{candidate.version} --again`, or give {gate.stage} back at once with `peftcore rollback --to "
        f"{candidate.version} --reason TEXT`"
    )
