"""The gate in CI: selects the versions of a job, judges or promotes them, and writes the verdict.

A job of any CI calls `peftcore ci` and has no logic of its own. The triggering event is read from the environment
variables of GitHub, GitLab or Jenkins. The verdict goes to standard output, to a Markdown file and, on GitHub, to the
job's summary and outputs.

A pushed version is promoted only if its parent commit, which has its code and parameters, is in the default branch. So
a version can be judged in a pull request, and is promoted once the pull request is merged.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

from flows.errors import GateError, PipelineError, RegistryConflict, RegistryError
from flows.gate.promote import Promotion, promote
from flows.gate.report import as_markdown
from flows.params import Params
from flows.paths import Paths
from flows.registry.commit_params import committed_params
from flows.registry.pending import judged_versions, note_judged, pending_versions
from flows.registry.project_registry import registry_of
from flows.registry.reader import RegistryReader, Version
from flows.registry.registry import Registry
from flows.registry.synchronise import synchronise
from flows.runtime.git import Git, GitError
from peftcore.files import write_atomically

logger = logging.getLogger(__name__)
NOTHING = "nothing to judge"
NOT_MERGED = "not merged"
ATTEMPTS = 4
"""Attempts to promote a version while other jobs are faster."""
DEFAULT_BRANCH = ("PEFTCORE_CI_DEFAULT_BRANCH", "CI_DEFAULT_BRANCH")
"""Variables with the name of the default branch. If none is set, the remote's HEAD names it."""
FETCHED = "refs/peftcore/default-branch"


@dataclass(frozen=True)
class Event:
    """The event that triggered a job.

    Attributes:
        tag: the pushed tag.
        base: the target branch of a pull request.
        branch: the branch of the job; None for tags and pull requests.
    """

    tag: str | None
    base: str | None
    branch: str | None = None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Event":
        """Read the event from the variables of GitHub, GitLab or Jenkins."""
        ref = environment.get("GITHUB_REF", "")
        tag = ref.removeprefix("refs/tags/") if ref.startswith("refs/tags/") else ""
        tags = (tag, *(environment.get(name, "") for name in ("CI_COMMIT_TAG", "TAG_NAME")))
        bases = ("GITHUB_BASE_REF", "CI_MERGE_REQUEST_TARGET_BRANCH_NAME", "CHANGE_TARGET")
        pushed, base = next(filter(None, tags), None), next(filter(None, map(environment.get, bases)), None)
        head = ref.removeprefix("refs/heads/") if ref.startswith("refs/heads/") else ""
        branches = (head, *(environment.get(name, "") for name in ("CI_COMMIT_BRANCH", "BRANCH_NAME")))
        return cls(pushed, base, None if pushed or base else next(filter(None, branches), None))


@dataclass(frozen=True)
class Verdict:
    """The verdict of a job.

    Attributes:
        word: the outcome in one word: that of a promotion, NOTHING or NOT_MERGED.
        version: the version that `word` is about; None if there is none.
        promotion: the promotion that `word` is about.
        judged: all promotions of the job, newest version first.
    """

    word: str
    version: str | None
    promotion: Promotion | None
    judged: tuple[Promotion, ...] = ()


@dataclass(frozen=True)
class DefaultBranch:
    """The fetched default branch of a remote. commit: its newest commit."""

    name: str
    commit: str


def default_branch(git: Git, environment: Mapping[str, str], remote: str) -> DefaultBranch:
    """Fetch the default branch. Raises RegistryError if its name is unknown or it cannot be fetched."""
    name = default_branch_name(git, environment, remote)
    try:
        git.run("fetch", "--quiet", "--no-tags", "--no-write-fetch-head", "--", remote, f"+refs/heads/{name}:{FETCHED}")
    except GitError as error:
        raise RegistryError(
            f"the default branch {name} of {remote} could not be fetched, and only versions of that branch are "
            f"promoted; if it has another name, set {DEFAULT_BRANCH[0]}: {error}"
        ) from error
    return DefaultBranch(name, git.run("rev-parse", FETCHED).strip())


def default_branch_name(git: Git, environment: Mapping[str, str], remote: str) -> str:
    """Return the default branch's name from the CI's variables, or else from the remote's HEAD.

    Raises:
        RegistryError: neither names a branch.
    """
    name = next(filter(None, map(environment.get, DEFAULT_BRANCH)), None)
    if name is not None:
        return name
    why = ""
    try:
        match = re.search(
            r"^ref: refs/heads/(\S+)\tHEAD$", git.run("ls-remote", "--symref", "--", remote, "HEAD"), re.MULTILINE
        )
    except GitError as error:
        match, why = None, f": {error}"
    if match is None:
        raise RegistryError(
            f"neither this CI nor the HEAD of {remote} names the default branch, and only versions of that branch are "
            f"promoted; set {DEFAULT_BRANCH[0]} to its name{why}"
        )
    return match[1]


@contextmanager
def rules_for(
    params: Params, paths: Paths, environment: Mapping[str, str], ref: str | None = None, remote: str = "origin"
) -> Iterator[Params]:
    """Give the parameters to judge by, from the protected branch: the judged commit must not set its own rules.

    Args:
        params: the checkout's parameters, for a job without a tag, a pull request and a named default branch.
        paths: the repository.
        environment: the job's variables.
        ref: a branch or commit of git; None is the target branch of a pull request, or the default branch.
        remote: the git remote.

    Raises:
        RegistryError: the rules cannot be read.
    """
    event, git = Event.of(environment), Git(paths.root)
    if ref is None and event.base is not None:
        ref = f"{remote}/{event.base}"
    elif ref is None and (event.tag is not None or any(map(environment.get, DEFAULT_BRANCH))):
        ref = default_branch(git, environment, remote).commit
    if ref is None:
        yield params
        return
    with TemporaryDirectory(prefix="peftcore-signers-") as folder:
        try:
            rules = committed_params(git, ref)
            signers = rules.gate.allowed_signers
            if signers is not None and not Path(signers).expanduser().is_absolute():
                copy = Path(folder) / "signers"
                copy.write_text(git.show(ref, signers), encoding="utf-8")
                gate = rules.gate.model_copy(update={"allowed_signers": str(copy)})
                rules = rules.model_copy(update={"gate": gate})
        except GitError as error:
            raise RegistryError(
                f"the rules could not be read from {ref} ({error}); clone with all branches, or name the branch or "
                "commit of the rules by --rules or PEFTCORE_CI_RULES"
            ) from error
        yield rules


def judge(
    params: Params,
    paths: Paths,
    environment: Mapping[str, str],
    report: Path,
    version: str | None = None,
    dry_run: bool | None = None,
    remote: str = "origin",
) -> Verdict:
    """Judge the versions of an event, promote one unless `dry_run`, and write the report, also after an error.

    Without `version`, only versions of the default branch are promoted: the version of a pushed tag, or each version
    that is newer than the holder of the stage and was not judged against it, newest first, until one passes.

    Args:
        params: the rules, from `rules_for`.
        paths: the repository.
        environment: the job's variables, which name the event and GitHub's files for summary and outputs.
        report: the Markdown file to write.
        version: the version to judge; None selects by the event.
        dry_run: judge only; None promotes on the push of a version's tag and in a job of the default branch.
        remote: the git remote that accepts the promotion of only one of several concurrent jobs.

    Raises:
        GateError: the gate refuses all versions.
        RegistryConflict: other jobs were faster at each attempt.
    """
    tell, sections = partial(_tell, environment, report), list[str]()
    event, number = Event.of(environment), version or None  # an empty input names no version
    try:
        registry = registry_of(params, paths.root, sign=True)
        dry = not _promotes(registry.git, event, environment, remote) if dry_run is None else dry_run
        if not dry:
            number = synchronise(registry, remote).get(number or "", number)
        if not dry and number is None and event.tag is None and event.base is None:
            default = default_branch(registry.git, environment, remote)
            verdict = _catch_up(params, paths, registry, default, remote, tell, sections)
        else:
            verdict = _judge_one(params, paths, registry, environment, number, dry, remote, tell, sections)
    except PipelineError as error:
        tell_error(environment, report, error, number, sections)
        raise
    if verdict.promotion is not None and not verdict.promotion.accepted:
        raise GateError(verdict.promotion.sentence)
    return verdict


def tell_error(
    environment: Mapping[str, str],
    report: Path,
    error: PipelineError,
    version: str | None = None,
    earlier: Sequence[str] = (),
) -> None:
    """Write the report of a job without a verdict. earlier: reports (Markdown) of versions judged before the error."""
    word = "conflict" if isinstance(error, RegistryConflict) else "error"
    section = f"## ❌ No verdict\n\n{escape(str(error), quote=False)}\n"
    _tell(environment, report, word, version, "\n".join([*earlier, section]))


def _judge_one(
    params: Params,
    paths: Paths,
    registry: Registry,
    environment: Mapping[str, str],
    number: str | None,
    dry: bool,
    remote: str,
    tell: Callable[[str, str | None, str], None],
    sections: list[str],
) -> Verdict:
    """Judge one version: `number`, or the event's version, which is promoted only if it is in the default branch.

    sections: gets the version's report, also if recording its refusal fails.
    """
    state = registry.snapshot()
    target = state.version(number) if number else _version_of(state, Event.of(environment), remote)
    if target is None:
        return _none(state, tell)
    if not dry and number is None:
        default = default_branch(registry.git, environment, remote)
        if not _is_merged(state, target, default):
            tell(NOT_MERGED, target.number, f"## {_not_merged(state, target, default)}\n")
            return Verdict(NOT_MERGED, target.number, None)
    promotion = _promote(params, paths, target.number, dry, remote)
    sections.append(as_markdown(promotion))
    if not dry and not promotion.accepted:
        note_judged(registry.snapshot(), params, target, remote)
    tell(promotion.outcome, target.number, sections[0])
    return Verdict(promotion.outcome, target.number, promotion, (promotion,))


def _none(registry: RegistryReader, tell: Callable[[str, str | None, str], None]) -> Verdict:
    tell(NOTHING, None, f"## {registry.name} has no version yet; `peftcore run` makes one\n")
    return Verdict(NOTHING, None, None)


def _promotes(git: Git, event: Event, environment: Mapping[str, str], remote: str) -> bool:
    """Return True if an event promotes: the push of a version's tag, or a job of the default branch."""
    if event.tag is not None or event.branch is None:
        return event.tag is not None
    return event.branch == default_branch_name(git, environment, remote)


def _catch_up(
    params: Params,
    paths: Paths,
    registry: Registry,
    default: DefaultBranch,
    remote: str,
    tell: Callable[[str, str | None, str], None],
    sections: list[str],
) -> Verdict:
    """Judge the waiting versions, newest first, until one is promoted.

    A refusal is recorded at the remote, so no later job judges the version again, and only this job reports it. So
    `sections` gets all reports even if another version cannot be judged. That error is raised if none is promoted.
    """
    judged, failures = list[Promotion](), dict[Version, PipelineError]()
    state = registry.snapshot()
    waiting = pending_versions(state, params, judged_versions(state, remote))
    for version in (version for version in waiting if _is_merged(state, version, default)):
        try:
            promotion = _promote(params, paths, version.number, False, remote)
        except RegistryConflict:
            raise
        except PipelineError as error:  # older versions are judged even if this version cannot be
            logger.warning("%s could not be judged: %s", version.tag, error)
            failures[version] = error
            continue
        judged.append(promotion)
        sections.append(as_markdown(promotion))
        if promotion.accepted:
            break
        note_judged(registry.snapshot(), params, version, remote)
    sections += [
        f"## ❌ {one.tag} was not judged\n\n{escape(str(why), quote=False)}\n" for one, why in failures.items()
    ]
    if failures and not any(promotion.accepted for promotion in judged):
        raise next(iter(failures.values()))
    if not state.versions():
        return _none(state, tell)
    if not judged:
        unmerged = [_not_merged(state, version, default) for version in waiting]
        tell(NOTHING, None, "\n".join(["## Nothing to judge\n", *unmerged]) + "\n")
        return Verdict(NOTHING, None, None)
    decisive = next((one for one in judged if one.accepted), judged[0])
    tell(decisive.outcome, decisive.version, "\n".join(sections))
    return Verdict(decisive.outcome, decisive.version, decisive, tuple(judged))


def _promote(params: Params, paths: Paths, version: str, dry_run: bool, remote: str) -> Promotion:
    """Judge a version, and judge it again if another job promoted meanwhile: the stage has another holder then."""
    for _ in range(ATTEMPTS - 1):
        try:
            return promote(params, paths, version, dry_run, None if dry_run else remote)
        except RegistryConflict as conflict:
            logger.warning("%s; judging %s again", conflict, version)
    return promote(params, paths, version, dry_run, None if dry_run else remote)


def _version_of(registry: RegistryReader, event: Event, remote: str) -> Version | None:
    """Return the version that a CI event is about.

    For a pushed tag: the tag's version. For a pull request: the newest version made on the request's own branch, if
    there is one. Else: the newest version; None if there is none.
    """
    versions = registry.versions()
    if event.tag is not None:
        return _tagged(registry, versions, event.tag)
    if event.base is not None:
        of_branch = [version for version in versions if _is_of_branch(registry, version, f"{remote}/{event.base}")]
        versions = of_branch or versions
    return versions[-1] if versions else None


def _is_merged(registry: RegistryReader, version: Version, default: DefaultBranch) -> bool:
    return _contains(registry.git, default.commit, f"{version.commit}^")


def _not_merged(registry: RegistryReader, version: Version, default: DefaultBranch) -> str:
    try:
        parent = registry.git.run("rev-parse", f"{version.commit}^").strip()[:10]
    except GitError:
        parent = "of its parent, which was not cloned (clone with the whole history)"
    return (
        f"{registry.name} {version.number} waits: the commit {parent} that it was made from is not in {default.name}. "
        f"A push to {default.name} that contains the commit promotes the version; "
        f"`peftcore ci --promote --version {version.number}` promotes it now"
    )


def _tagged(registry: RegistryReader, versions: list[Version], tag: str) -> Version:
    """Return the version of a tag. Raises RegistryError that lists the versions there are."""
    tagged = next((version for version in versions if version.tag == tag), None)
    if tagged is not None:
        return tagged
    available = ", ".join(version.tag for version in versions) or "none"
    if re.fullmatch(re.escape(registry.name) + r"@v\d+\.\d+\.\d+", tag):
        why = "is not an annotated tag here, or was withdrawn"
    else:
        why = f"names no version of {registry.name} (such as {registry.name}@v0.1.0)"
    raise RegistryError(
        f"the tag {tag} {why}, so there is nothing to promote; there is: {available}. Clone with all tags and their "
        "history, and let the job run for tags of versions only"
    )


def _is_of_branch(registry: RegistryReader, version: Version, base: str) -> bool:
    """Return True if a version was made from a commit of the checked-out branch that is not in `base`."""
    parent = f"{version.commit}^"
    return _contains(registry.git, "HEAD", parent) and not _contains(registry.git, base, parent)


def _contains(git: Git, branch: str, commit: str) -> bool:
    try:
        return git.run("rev-list", "--max-count=1", commit, f"^{branch}").strip() == ""
    except GitError:  # the base or the parent was not cloned
        return False


def _tell(environment: Mapping[str, str], report: Path, word: str, version: str | None, markdown: str) -> None:
    write_atomically(report, markdown)
    if summary := environment.get("GITHUB_STEP_SUMMARY"):
        with Path(summary).open("a", encoding="utf-8") as file:
            file.write(markdown + "\n")
    if outputs := environment.get("GITHUB_OUTPUT"):
        # a newline in a value would begin another output
        pairs = {"verdict": word, "version": version or "", "report": str(report.resolve())}
        lines = [f"{name}={' '.join(value.split())}\n" for name, value in pairs.items()]
        with Path(outputs).open("a", encoding="utf-8") as file:
            file.write("".join(lines))
