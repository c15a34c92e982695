"""The gate in CI: which versions a job is about, whether they are only judged or promoted, where the verdict is told.

A job of any CI calls `peftcore ci` and holds no logic of its own. What triggered it is read from the variables that
GitHub, GitLab or Jenkins set; what came of it goes to standard output, to a Markdown file and, on GitHub, to the job's
summary and outputs.

A pushed version is promoted only if its parent commit, which has its code and parameters, is in the default branch. So
a version can be pushed for a pull request to be judged, and is promoted once the pull request is merged.
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
from flows.params import Params, load_params
from flows.paths import Paths
from flows.registry.pending import judged_versions, note_judged, pending_versions
from flows.registry.project_registry import registry_of
from flows.registry.registry import Registry, Version
from flows.registry.synchronise import synchronise
from flows.runtime.git import Git, GitError
from peftcore.files import write_atomically

logger = logging.getLogger(__name__)
NOTHING = "nothing to judge"
NOT_MERGED = "not merged"
ATTEMPTS = 4
"""Times that a version is judged while other jobs are promoted first."""
DEFAULT_BRANCH = ("PEFTCORE_CI_DEFAULT_BRANCH", "CI_DEFAULT_BRANCH")
"""Variables that tell the default branch; where none does, the remote's HEAD is asked."""
FETCHED = "refs/peftcore/default-branch"


@dataclass(frozen=True)
class Event:
    """What triggered a job. tag: the one that was pushed; base: the branch that a pull request is to change; branch:
    the one that the job is of, None for tags and pull requests.
    """

    tag: str | None
    base: str | None
    branch: str | None = None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Event":
        ref = environment.get("GITHUB_REF", "")
        tag = ref.removeprefix("refs/tags/") if ref.startswith("refs/tags/") else ""
        tags = (tag, *(environment.get(name, "") for name in ("CI_COMMIT_TAG", "TAG_NAME")))
        bases = ("GITHUB_BASE_REF", "CI_MERGE_REQUEST_TARGET_BRANCH_NAME", "CHANGE_TARGET")
        found, base = next(filter(None, tags), None), next(filter(None, map(environment.get, bases)), None)
        head = ref.removeprefix("refs/heads/") if ref.startswith("refs/heads/") else ""
        branches = (head, *(environment.get(name, "") for name in ("CI_COMMIT_BRANCH", "BRANCH_NAME")))
        return cls(found, base, None if found or base else next(filter(None, branches), None))


@dataclass(frozen=True)
class Verdict:
    """What a job found. word: an outcome of a promotion, NOTHING or NOT_MERGED; version: None where there is none.

    promotion: the one that `word` is about; judged: all that were judged, the newest version first.
    """

    word: str
    version: str | None
    promotion: Promotion | None
    judged: tuple[Promotion, ...] = ()


@dataclass(frozen=True)
class DefaultBranch:
    """The default branch of a remote, fetched. commit: its newest."""

    name: str
    commit: str


def default_branch(git: Git, environment: Mapping[str, str], remote: str) -> DefaultBranch:
    """Fetch the default branch. Raises RegistryError if nothing tells it, or it cannot be fetched."""
    name = default_branch_name(git, environment, remote)
    try:
        git.run("fetch", "--quiet", "--no-tags", "--no-write-fetch-head", "--", remote, f"+refs/heads/{name}:{FETCHED}")
    except GitError as error:
        raise RegistryError(
            f"the default branch {name} of {remote} could not be fetched, and only what is in it is promoted; if it "
            f"has another name, set {DEFAULT_BRANCH[0]}: {error}"
        ) from error
    return DefaultBranch(name, git.run("rev-parse", FETCHED).strip())


def default_branch_name(git: Git, environment: Mapping[str, str], remote: str) -> str:
    """The default branch as the CI names it, or else the remote's HEAD. Raises RegistryError if neither tells it."""
    told = next(filter(None, map(environment.get, DEFAULT_BRANCH)), None)
    if told is not None:
        return told
    why = ""
    try:
        found = re.search(
            r"^ref: refs/heads/(\S+)\tHEAD$", git.run("ls-remote", "--symref", "--", remote, "HEAD"), re.MULTILINE
        )
    except GitError as error:
        found, why = None, f": {error}"
    if found is None:
        raise RegistryError(
            f"neither this CI nor the HEAD of {remote} tells which branch is the default one, and only what is in it "
            f"is promoted; set {DEFAULT_BRANCH[0]} to its name{why}"
        )
    return found[1]


@contextmanager
def rules_for(
    params: Params, paths: Paths, environment: Mapping[str, str], ref: str | None = None, remote: str = "origin"
) -> Iterator[Params]:
    """The parameters to judge by, which the judged commit must not choose: those of the protected branch.

    params: those of the checkout, which hold for a job of neither a tag nor a pull request where nothing names such a
    branch. ref: a branch or commit of git; None is the branch that a pull request is to change, or the default branch.
    The list of signers comes from there too. Raises RegistryError if there are no rules to read.
    """
    event, git = Event.of(environment), Git(paths.root)
    if ref is None and event.base is not None:
        ref = f"{remote}/{event.base}"
    elif ref is None and (event.tag is not None or any(map(environment.get, DEFAULT_BRANCH))):
        ref = default_branch(git, environment, remote).commit
    if ref is None:
        yield params
        return
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
    """Judge what an event is about, promote it where `dry_run` is false, and tell of it; also where that fails.

    What is promoted without `version` has to be in the default branch: the version of a pushed tag or of a pull
    request, or else each that is newer than the holder of the stage and was not judged against it, until one passes.

    params: the rules, see `rules_for`. environment: the job's, which says what triggered it and where GitHub wants
    summary and outputs. report: where the Markdown goes. version: None is that of the event. dry_run: None promotes
    on the push of a version's tag and in a job of the default branch. remote: the git remote that decides between jobs.
    Raises GateError if the gate refuses all, RegistryConflict if other jobs promoted first each time.
    """
    tell, told = partial(_tell, environment, report), list[str]()
    event, number = Event.of(environment), version or None  # an input that is left empty names none
    try:
        registry = registry_of(params, paths.root, sign=True)
        dry = not _promotes(registry.git, event, environment, remote) if dry_run is None else dry_run
        if not dry:
            number = synchronise(registry, remote).get(number or "", number)
        if not dry and number is None and event.tag is None and event.base is None:
            default = default_branch(registry.git, environment, remote)
            verdict = _catch_up(params, paths, registry, default, remote, tell, told)
        else:
            verdict = _judge_one(params, paths, registry, environment, number, dry, remote, tell, told)
    except PipelineError as error:
        tell_error(environment, report, error, number, told)
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
    """Tell that a job came to no verdict. earlier: reports (Markdown) of the versions that it judged before."""
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
    told: list[str],
) -> Verdict:
    """Judge one version: `number`, or that of the event, which is promoted only if it is in the default branch.

    told: gets the report of the version, also where noting its refusal fails.
    """
    chosen = registry.version(number) if number else _version_of(registry, Event.of(environment), remote)
    if chosen is None:
        return _none(registry, tell)
    if not dry and number is None:
        default = default_branch(registry.git, environment, remote)
        if not _is_merged(registry, chosen, default):
            tell(NOT_MERGED, chosen.number, f"## {_not_merged(registry, chosen, default)}\n")
            return Verdict(NOT_MERGED, chosen.number, None)
    promotion = _promote(params, paths, chosen.number, dry, remote)
    told.append(as_markdown(promotion))
    if not dry and not promotion.accepted:
        note_judged(registry, params, chosen, remote)
    tell(promotion.outcome, chosen.number, told[0])
    return Verdict(promotion.outcome, chosen.number, promotion, (promotion,))


def _none(registry: Registry, tell: Callable[[str, str | None, str], None]) -> Verdict:
    tell(NOTHING, None, f"## {registry.name} has no version yet; `peftcore run` makes one\n")
    return Verdict(NOTHING, None, None)


def _promotes(git: Git, event: Event, environment: Mapping[str, str], remote: str) -> bool:
    """Whether an event promotes: a version's tag, and a job of the default branch."""
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
    told: list[str],
) -> Verdict:
    """Judge the waiting versions, the newest first, until one is promoted.

    A refusal is noted at the remote, so no later job judges the version again, and only this one can tell of it. So
    `told` gets the reports also where another version cannot be judged, whose error is raised if none is promoted.
    """
    judged, failures = list[Promotion](), dict[Version, PipelineError]()
    waiting = pending_versions(registry, params, judged_versions(registry, remote))
    for version in (version for version in waiting if _is_merged(registry, version, default)):
        try:
            promotion = _promote(params, paths, version.number, False, remote)
        except RegistryConflict:
            raise
        except PipelineError as error:  # a version that cannot be judged must not keep older ones from it
            logger.warning("%s could not be judged: %s", version.tag, error)
            failures[version] = error
            continue
        judged.append(promotion)
        told.append(as_markdown(promotion))
        if promotion.accepted:
            break
        note_judged(registry, params, version, remote)
    told += [f"## ❌ {one.tag} was not judged\n\n{escape(str(why), quote=False)}\n" for one, why in failures.items()]
    if failures and not any(promotion.accepted for promotion in judged):
        raise next(iter(failures.values()))
    if not registry.versions():
        return _none(registry, tell)
    if not judged:
        others = [_not_merged(registry, version, default) for version in waiting]
        tell(NOTHING, None, "\n".join(["## Nothing to judge\n", *others]) + "\n")
        return Verdict(NOTHING, None, None)
    decisive = next((one for one in judged if one.accepted), judged[0])
    tell(decisive.outcome, decisive.version, "\n".join(told))
    return Verdict(decisive.outcome, decisive.version, decisive, tuple(judged))


def _promote(params: Params, paths: Paths, version: str, dry_run: bool, remote: str) -> Promotion:
    """Judge, again where another job promoted meanwhile: then there is another holder of the stage to compare with."""
    for _ in range(ATTEMPTS - 1):
        try:
            return promote(params, paths, version, dry_run, None if dry_run else remote)
        except RegistryConflict as conflict:
            logger.warning("%s; judging %s again", conflict, version)
    return promote(params, paths, version, dry_run, None if dry_run else remote)


def _version_of(registry: Registry, event: Event, remote: str) -> Version | None:
    """The version whose tag was pushed; or the newest that a pull request's branch registered; or the newest."""
    versions = registry.versions()
    if event.tag is not None:
        return _tagged(registry, versions, event.tag)
    if event.base is not None:
        own = [version for version in versions if _is_of_branch(registry, version, f"{remote}/{event.base}")]
        versions = own or versions
    return versions[-1] if versions else None


def _is_merged(registry: Registry, version: Version, default: DefaultBranch) -> bool:
    return _contains(registry.git, default.commit, f"{version.commit}^")


def _not_merged(registry: Registry, version: Version, default: DefaultBranch) -> str:
    try:
        parent = registry.git.run("rev-parse", f"{version.commit}^").strip()[:10]
    except GitError:
        parent = "of its parent, which was not cloned (clone with the whole history)"
    return (
        f"{registry.name} {version.number} waits: the commit {parent} that it was made from is not in {default.name}. "
        f"A push to {default.name} that contains it promotes; `peftcore ci --promote --version {version.number}` "
        "promotes it all the same"
    )


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
