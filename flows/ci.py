"""The gate in CI: which version a job is about, whether it is only judged or promoted, and where the verdict is told.

A job of any CI calls `peftcore ci` and holds no logic of its own. What triggered it is read from the variables that
GitHub, GitLab or Jenkins set; what came of it goes to standard output, to a Markdown file and, on GitHub, to the job's
summary and outputs.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

from flows.errors import GateError, PipelineError, RegistryConflict, RegistryError
from flows.git import Git, GitError
from flows.params import Params, load_params
from flows.paths import Paths
from flows.promotion.project_registry import registry_of
from flows.promotion.promote import Promotion, promote
from flows.promotion.registry import Registry, Version
from flows.promotion.report import as_markdown
from peftcore.files import write_atomically

NOTHING = "nothing to judge"


@dataclass(frozen=True)
class Event:
    """What triggered a job. tag: the one that was pushed; base: the branch that a pull request is to change."""

    tag: str | None
    base: str | None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Event":
        ref = environment.get("GITHUB_REF", "")
        tag = ref.removeprefix("refs/tags/") if ref.startswith("refs/tags/") else ""
        tags = (tag, *(environment.get(name, "") for name in ("CI_COMMIT_TAG", "TAG_NAME")))
        bases = ("GITHUB_BASE_REF", "CI_MERGE_REQUEST_TARGET_BRANCH_NAME", "CHANGE_TARGET")
        return cls(next(filter(None, tags), None), next(filter(None, map(environment.get, bases)), None))


@dataclass(frozen=True)
class Verdict:
    """What a job found. word: an outcome of a promotion, or NOTHING; version: None where there is none."""

    word: str
    version: str | None
    promotion: Promotion | None


@contextmanager
def rules_for(
    params: Params, paths: Paths, environment: Mapping[str, str], ref: str | None = None, remote: str = "origin"
) -> Iterator[Params]:
    """The parameters to judge by, which the judged commit must not choose: those of the protected branch.

    params: those of the checkout, which hold where nothing names such a branch. ref: a branch or commit of git; None is
    the branch that a pull request is to change, or GitLab's default branch. The list of signers comes from there too.
    Raises RegistryError if there are no rules to read.
    """
    branch = Event.of(environment).base or environment.get("CI_DEFAULT_BRANCH")
    ref = ref or (f"{remote}/{branch}" if branch else None)
    if ref is None:
        yield params
        return
    git = Git(paths.root)
    with TemporaryDirectory(prefix="peftcore-rules-") as folder:
        rules = Paths(Path(folder))
        try:
            rules.params.write_text(git.show(ref, paths.params.name))
            found = load_params(rules.params)
            signers = found.gate.allowed_signers
            if signers is not None and not Path(signers).expanduser().is_absolute():
                (rules.root / "signers").write_text(git.show(ref, signers))
                gate = found.gate.model_copy(update={"allowed_signers": str(rules.root / "signers")})
                found = found.model_copy(update={"gate": gate})
        except GitError as error:
            raise RegistryError(
                f"the rules could not be read from {ref} ({error}); clone with all branches, or name the branch or "
                "commit that has them by --rules or PEFTCORE_CI_RULES"
            ) from error
        yield found


def judge(
    params: Params,
    paths: Paths,
    environment: Mapping[str, str],
    report: Path,
    version: str | None = None,
    dry_run: bool | None = None,
    remote: str = "origin",
) -> Verdict:
    """Judge a version, promote it where `dry_run` is false, and tell of it; also where that fails.

    params: the rules, see `rules_for`. environment: the job's, which says what triggered it and where GitHub wants
    summary and outputs. report: where the Markdown goes. version: None is that of the event. dry_run: None promotes
    only on the push of a version's tag. remote: the git remote that decides between jobs.
    Raises GateError if the gate refuses, RegistryConflict if another job promoted first.
    """
    event = Event.of(environment)
    try:
        registry = registry_of(params, paths.root)
        chosen = registry.version(version) if version else _version_of(registry, event, remote)
        if chosen is None:
            sentence = f"{registry.name} has no version yet; `peftcore run` makes one"
            _tell(environment, report, NOTHING, None, f"## {sentence}\n")
            return Verdict(NOTHING, None, None)
        version = chosen.number
        dry = event.tag is None if dry_run is None else dry_run
        promotion = promote(params, paths, version, dry, None if dry else remote)
    except PipelineError as error:
        word = "conflict" if isinstance(error, RegistryConflict) else "error"
        _tell(environment, report, word, version, f"## ❌ No verdict\n\n{escape(str(error), quote=False)}\n")
        raise
    _tell(environment, report, promotion.outcome, version, as_markdown(promotion))
    if not promotion.accepted:
        raise GateError(promotion.sentence)
    return Verdict(promotion.outcome, version, promotion)


def _version_of(registry: Registry, event: Event, remote: str) -> Version | None:
    """The version whose tag was pushed; or the newest that a pull request's branch registered; or the newest."""
    versions = registry.versions()
    if event.tag is not None:
        return _tagged(registry, versions, event.tag)
    if event.base is not None:
        own = [version for version in versions if _is_of_branch(registry, version, f"{remote}/{event.base}")]
        versions = own or versions
    return versions[-1] if versions else None


def _tagged(registry: Registry, versions: list[Version], tag: str) -> Version:
    """Raises RegistryError, saying what fits, unless the tag is a version's."""
    found = next((version for version in versions if version.tag == tag), None)
    if found is not None:
        return found
    there = ", ".join(version.tag for version in versions) or "none"
    if re.fullmatch(re.escape(registry.name) + r"@v\d+\.\d+\.\d+", tag):
        why = "is not an annotated tag here, or was taken back"
    else:
        why = f"names no version of {registry.name} (they look like {registry.name}@v0.1.0)"
    raise RegistryError(
        f"the tag {tag} {why}, so there is nothing to promote; there is: {there}. Clone with all tags and their "
        "history, and let the job run for tags of versions only"
    )


def _is_of_branch(registry: Registry, version: Version, base: str) -> bool:
    """Whether a version was made from a commit of the branch that is checked out, and not from one of `base`."""
    parent = f"{version.commit}^"
    return _contains(registry.git, "HEAD", parent) and not _contains(registry.git, base, parent)


def _contains(git: Git, branch: str, commit: str) -> bool:
    try:
        return git.run("rev-list", "--max-count=1", commit, f"^{branch}").strip() == ""
    except GitError:  # a base or a parent that was not cloned contains nothing
        return False


def _tell(environment: Mapping[str, str], report: Path, word: str, version: str | None, markdown: str) -> None:
    write_atomically(report, markdown)
    if summary := environment.get("GITHUB_STEP_SUMMARY"):
        with Path(summary).open("a", encoding="utf-8") as file:
            file.write(markdown + "\n")
    if outputs := environment.get("GITHUB_OUTPUT"):
        # a new line in a value would begin an output of somebody else's choice
        pairs = {"verdict": word, "version": version or "", "report": str(report.resolve())}
        lines = [f"{name}={' '.join(value.split())}\n" for name, value in pairs.items()]
        with Path(outputs).open("a", encoding="utf-8") as file:
            file.write("".join(lines))
