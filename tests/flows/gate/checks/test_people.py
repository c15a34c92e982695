"""Decisions of people: signatures, approvals, and a stage that was taken back."""

from collections.abc import Callable
from dataclasses import replace

from gate_cases import check, judge, reason

from flows.gate.candidate import Candidate
from flows.registry.lineage import content_digest
from flows.registry.signatures import Signature
from peftcore.files import write_manifest


def test_a_signature_has_to_be_of_this_very_adapter(make: Callable[..., Candidate]) -> None:
    candidate = make()
    signed = replace(candidate, signature=Signature("ada@example.org"), content=content_digest(dict(candidate.files)))
    asked = {"allowed_signers": "signers"}
    report = judge(signed, **asked)
    assert report.passed and "ada@example.org signed docstrings@v0.2.0" in check(report, "signature")
    assert "is not signed by anybody in signers (it was not read)" in reason(judge(candidate, **asked))
    assert "`git tag --delete docstrings@v0.2.0`" in reason(judge(candidate, **asked))
    assert "`peftcore stage register --force`" in reason(judge(candidate, **asked))
    unknown = replace(signed, signature=Signature(None, "No principal matched"))
    assert "is not signed by anybody in signers (No principal matched)" in reason(judge(unknown, **asked))
    # files and record changed together are whole, and still not what was signed
    config = candidate.adapter / "adapter_config.json"
    config.write_text('{"peft_type": "IA3"}')
    changed = replace(signed, files=write_manifest(candidate.adapter))
    assert reason(judge(changed, **asked)).startswith(
        "signature: ada@example.org signed another adapter as docstrings@v0.2.0"
    )


def test_enough_people_have_to_approve(make: Callable[..., Candidate]) -> None:
    one = replace(make(), approved_by=("ada@example.org",))
    assert judge(one, approvals=1).passed
    text = reason(judge(one, approvals=2))
    assert text.startswith("approval: 1 of 2: ada@example.org; people other than the one who registered it")
    assert "`peftcore approve v0.2.0 --note TEXT`" in text


def test_unsigned_approvals_are_said_to_prove_nothing(make: Callable[..., Candidate]) -> None:
    approved = replace(make(), approved_by=("ada@example.org",))
    assert "unsigned e-mails prove nothing" in check(judge(approved, approvals=1), "approval")
    signed = replace(make(), signature=Signature("ada@example.org"), unsigned_approvals=2)
    signed = replace(signed, content=content_digest(dict(signed.files)))
    text = reason(judge(signed, approvals=1, allowed_signers="signers"))
    assert text.startswith("approval: 0 of 1;") and "2 more do not count, because nobody in signers signed them" in text


def test_a_stage_that_was_taken_back_is_given_again_only_on_demand(make: Callable[..., Candidate]) -> None:
    candidate = replace(make(), withdrawn="docstrings#champion#4 rolled it back (wrong answers)")
    assert "promote --version v0.2.0 --again" in reason(judge(candidate))
    assert judge(replace(candidate, again=True)).passed
