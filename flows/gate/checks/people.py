"""Checks of people's decisions: the version's signature, its approvals, and an earlier withdrawal of the stage.

Without `gate.allowed_signers` an approval is an e-mail that anybody can set in git, so it proves nothing.
"""

from flows.gate.candidate import Candidate, CheckResult
from flows.params import Gate
from flows.registry.lineage import content_digest
from flows.registry.signatures import VARIABLE
from peftcore.files import MANIFEST, sha256


def signature(candidate: Candidate, gate: Gate) -> CheckResult:
    """Check that a listed person signed the version's tag, and that the tag names this adapter."""
    if gate.allowed_signers is None:
        return True, "not required"
    tag, signature = f"{candidate.name}@{candidate.version}", candidate.signature
    if signature is None or signature.signer is None:
        why = signature.problem if signature else "it was not read"
        return False, (
            f"{tag} is not signed by anybody in {gate.allowed_signers} ({why}); if it can be trusted, set "
            f"register.signing_key or {VARIABLE} to a key of that list, delete the tag (`git tag --delete {tag}`), and "
            "register it again (`peftcore stage register --force`)"
        )
    files = {path.name: sha256(path) for path in candidate.adapter.iterdir() if path.name != MANIFEST}
    if content_digest(files) != candidate.content:
        return False, f"{signature.signer} signed another adapter as {tag}; run the pipeline again"
    return True, f"{signature.signer} signed {tag}, with the digest of this adapter"


def approval(candidate: Candidate, gate: Gate) -> CheckResult:
    """Check that enough people have approved the version."""
    if gate.approvals == 0:
        return True, "not required"
    by = f": {', '.join(candidate.approved_by)}" if candidate.approved_by else ""
    count, note = f"{len(candidate.approved_by)} of {gate.approvals}{by}", ""
    if gate.allowed_signers is None and candidate.approved_by:
        note = "; unsigned e-mails prove nothing, gate.allowed_signers requires signatures"
    elif candidate.unsigned_approvals:
        note = (
            f"; {candidate.unsigned_approvals} more do not count, because nobody in {gate.allowed_signers} signed them"
        )
    if len(candidate.approved_by) >= gate.approvals:
        return True, f"{count}{note}"
    return False, (
        f"{count}; people other than the one who registered it approve it with `peftcore approve {candidate.version} "
        f"--note TEXT` (`peftcore registry fetch` gets the approvals of a remote){note}"
    )


def not_withdrawn(candidate: Candidate, gate: Gate) -> CheckResult:
    """Check that the adapter did not lose the stage before. Only a person's command gives it the stage again."""
    if candidate.withdrawn is None:
        return True, "it did not lose the stage before"
    if candidate.again:
        return True, f"{candidate.withdrawn}, and --again was given"
    return False, (
        f"{candidate.withdrawn}; judge it again with `peftcore promote --version {candidate.version} --again`, or give "
        f"{gate.stage} back without the gate with `peftcore rollback --to {candidate.version} --reason TEXT`"
    )
