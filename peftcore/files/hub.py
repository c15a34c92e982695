"""Adapters on the Hugging Face hub: finding an adapter's directory, and uploading one.

A name is a local directory or a hub id (`owner/name`). A local directory wins, as in HF PEFT. From the hub only the
files of an adapter are downloaded, all of one commit, into the hub's cache. Pickles are never downloaded. The result
is a directory, and everything that is checked for a local directory is checked for a downloaded one.
"""

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peftcore.errors import CheckpointError, ConfigError, pickle_advice, suggestion
from peftcore.files import CONFIG_NAME, MANIFEST, PROMPT_STATE, WEIGHTS_NAME, read_manifest, whole_files

OPTIONS = frozenset(
    {
        "cache_dir",
        "endpoint",
        "etag_timeout",
        "force_download",
        "headers",
        "library_name",
        "library_version",
        "local_dir",
        "local_files_only",
        "repo_type",
        "revision",
        "subfolder",
        "token",
        "tqdm_class",
        "user_agent",
    }
)
"""Options of a download, with the meaning that they have in `huggingface_hub.hf_hub_download`."""
_FORMER = {
    "proxies": "set the environment variables HTTP_PROXY and HTTPS_PROXY",
    "resume_download": "leave it out, because an interrupted download is always resumed",
    "dry_run": "leave it out, because an adapter cannot be loaded without its files",
}
"""{option that has no meaning here: what to do instead}"""
_PICKLE = "adapter_model.bin"
_CARD = "README.md"
_REFUSED = 403
_UNAUTHORISED = 401


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (options of a download, all other options).

    `use_auth_token` becomes `token`, with a warning.

    Args:
        options: Keyword arguments of a function that loads an adapter.

    Raises:
        ConfigError: For an option of older versions of `huggingface_hub` that cannot be followed.
    """
    options = dict(options)
    if (token := options.pop("use_auth_token", None)) is not None:
        warnings.warn("use_auth_token is deprecated; use token", FutureWarning, stacklevel=3)
        options.setdefault("token", token)
    for name, advice in _FORMER.items():
        if options.pop(name, None):
            raise ConfigError(f"{name} is not supported; {advice}")
    return (
        {name: value for name, value in options.items() if name in OPTIONS},
        {name: value for name, value in options.items() if name not in OPTIONS},
    )


def checked_options(function: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a download; raise TypeError for any other option.

    Args:
        function: The function's name, for the error message.
        options: Its keyword arguments.
    """
    hub, others = split_options(options)
    if others:
        name = next(iter(others))
        raise TypeError(f"{function}() has no option {name!r}{suggestion(name, OPTIONS)}")
    return hub


# -- finding an adapter ------------------------------------------------------------------------------------------------


def adapter_directory(
    model_id: str | os.PathLike[str], needs_config: bool = True, needs_weights: bool = True, **options: Any
) -> Path:
    """Return the directory of an adapter, after downloading it if it is not a local one.

    Args:
        model_id: An existing directory, or a hub id such as "owner/name". A `Path` is never a hub id.
        needs_config: True if the configuration is read, too.
        needs_weights: True if the weights are read, too.
        options: `OPTIONS`. For a local directory, only `subfolder` has an effect.

    Returns:
        The local directory (of the subfolder, if one is named), or the downloaded one in the hub's cache.

    Raises:
        CheckpointError: The adapter is not found, or cannot be downloaded. The message says why and what to do.
    """
    if is_local(model_id):
        if options.get("revision") not in (None, "main"):
            warnings.warn(
                f"revision={options['revision']!r} has no effect on the local directory {model_id}", stacklevel=3
            )
        return Path(model_id, options.get("subfolder") or "")
    repo_id = str(model_id)
    folder, pinned = None, dict(options)
    if needs_config:
        folder, pinned = _downloaded(repo_id, CONFIG_NAME, options)
    if needs_weights:
        folder, pinned = _downloaded(repo_id, WEIGHTS_NAME, pinned)
        if _optional_file(repo_id, MANIFEST, pinned) and PROMPT_STATE in read_manifest(folder):
            _optional_file(repo_id, PROMPT_STATE, pinned)
    assert folder is not None, "a caller needs the configuration, the weights, or both"
    return folder


def is_local(model_id: str | os.PathLike[str]) -> bool:
    """Return True if an adapter's name is a local path: an existing one, or a name that cannot be a hub id."""
    if not isinstance(model_id, str | os.PathLike):
        raise TypeError(f"an adapter is a directory or a hub id such as 'owner/name'; got {model_id!r:.200}")
    return not isinstance(model_id, str) or os.path.lexists(model_id) or not _may_be_hub_id(model_id)


def _may_be_hub_id(text: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def further_file(model_id: str | os.PathLike[str], name: str, **options: Any) -> Path | None:
    """Return the local path of a file beside the adapter's own, of a hub file in the cache; None without such a file.

    Args:
        model_id: See `adapter_directory`.
        name: The file's name.
        options: `OPTIONS`.
    """
    if is_local(model_id):
        path = Path(model_id, options.get("subfolder") or "", name)
        return path if path.is_file() else None
    return _optional_file(str(model_id), name, options)


def is_offline(options: Mapping[str, Any]) -> bool:
    """Return True if only cached files may be used: by HF_HUB_OFFLINE=1, or by `local_files_only` in the options."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE or bool(options.get("local_files_only"))


@contextmanager
def naming_download(model_id: str | os.PathLike[str]) -> Iterator[None]:
    """Add, to errors about the content of a downloaded directory, where it came from and how to download it again."""
    try:
        yield
    except CheckpointError as error:
        if is_local(model_id):
            raise
        raise CheckpointError(
            f"{error} (downloaded from the hub, {model_id!r}; if the files were damaged here, "
            "load with force_download=True)"
        ) from error


def _downloaded(repo_id: str, name: str, options: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Download one file.

    Returns:
        The folder that holds the file, and the options that fetch other files of the same commit.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with _explained(repo_id, name, options):
        try:
            file = Path(hf_hub_download(repo_id, name, **{"user_agent": _user_agent(), **options}))
        except EntryNotFoundError as error:
            if not isinstance(error, LocalEntryNotFoundError):
                raise CheckpointError(_missing_on_hub(repo_id, name, options)) from error
            raise
    return file.parent, {**options, **_commit_of(file, options.get("subfolder"))}


def _commit_of(file: Path, subfolder: str | None) -> dict[str, str]:
    """Return the revision of a file in the cache, `.../snapshots/COMMIT/...`; {} for a file elsewhere (`local_dir`)."""
    root = file.parents[len(Path(subfolder or "").parts)]
    return {"revision": root.name} if root.parent.name == "snapshots" else {}


def _optional_file(repo_id: str, name: str, options: Mapping[str, Any]) -> Path | None:
    """Download an optional file of an adapter; return its path, or None if the repository does not have the file."""
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    subfolder = options.get("subfolder")
    path = f"{subfolder}/{name}" if subfolder else name
    places = {key: options[key] for key in ("cache_dir", "revision", "repo_type") if options.get(key)}
    if try_to_load_from_cache(repo_id, path, **places) is _CACHED_NO_EXIST and not options.get("force_download"):
        return None
    with _explained(repo_id, name, options):
        try:
            return Path(hf_hub_download(repo_id, name, **{"user_agent": _user_agent(), **options}))
        except EntryNotFoundError:  # also without a network, if the file is not in the cache
            return None


def _user_agent() -> str:
    from transformers.utils.hub import http_user_agent

    return http_user_agent()


def _missing_on_hub(repo_id: str, name: str, options: Mapping[str, Any]) -> str:
    from huggingface_hub import HfApi

    subfolder, revision = options.get("subfolder"), options.get("revision")
    location = f"{repo_id}, subfolder {subfolder!r}" if subfolder else repo_id
    location = f"{location}, revision {revision!r}" if revision else location
    if name == WEIGHTS_NAME:
        pickle = f"{subfolder}/{_PICKLE}" if subfolder else _PICKLE
        where = {key: options.get(key) for key in ("revision", "repo_type")}
        if HfApi(endpoint=options.get("endpoint"), token=options.get("token")).file_exists(repo_id, pickle, **where):
            return f"{location} holds no {name} but {_PICKLE}: {pickle_advice(repo_id, subfolder)}"
        return (
            f"{location} holds a configuration without weights: no {name} there; ask its author to upload the weights"
        )
    return (
        f"no {name} in {location}: it is not an adapter; check the name and subfolder=. The base model itself is "
        "loaded with transformers"
    )


@contextmanager
def _explained(repo_id: str, name: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Turn errors of a download into CheckpointError with what to do."""
    try:
        yield
    except CheckpointError:
        raise
    except (_connection_error(), OSError, ValueError) as error:
        # huggingface_hub raises ValueError for options that do not fit, also on top of the error that matters
        reason = error.__cause__ if isinstance(error, ValueError) and error.__cause__ is not None else error
        message = _reason(repo_id, name, options, reason)
        if message is None:
            raise
        raise CheckpointError(message) from error


def _reason(repo_id: str, name: str, options: Mapping[str, Any], error: BaseException) -> str | None:
    """Return the message for an error of a download; None for an error that is not the hub's, such as a full disk."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repo_id} is gated: accept its conditions at {constants.ENDPOINT}/{repo_id}, then log in with "
            "`hf auth login`, or give token="
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return _not_found(repo_id)
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"{repo_id} has no revision {options.get('revision')!r}; give a branch, a tag or a commit that "
            f"{constants.ENDPOINT}/{repo_id}/commits/main lists"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return _not_in_cache(repo_id, name, options, error)
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"{repo_id}: token=True needs a stored token; log in with `hf auth login`"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{repo_id}: nothing is downloaded while HF_HUB_OFFLINE=1 is set; unset it"
    if isinstance(error, errors.HfHubHTTPError):
        return _http_error(repo_id, error)
    if isinstance(error, _connection_error()):
        return (
            f"{repo_id}: the connection to {constants.ENDPOINT} failed ({error}); run it again, the download goes on "
            "where it ended"
        )
    if isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno is None):
        return f"{repo_id}: {error}"
    return None


def _connection_error() -> type[Exception]:
    """Return the base class of the errors of huggingface_hub's HTTP client, which is a package of its own."""
    from huggingface_hub import errors

    return errors.HTTPError  # type: ignore[attr-defined]


def _not_in_cache(repo_id: str, name: str, options: Mapping[str, Any], error: BaseException) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    cache = options.get("cache_dir") or constants.HF_HUB_CACHE
    start = f"there is no directory {repo_id!r} here, and {name} of the hub's {repo_id} is not in the cache {cache}"
    if options.get("local_files_only"):
        return f"{start}; run it once with a network and without local_files_only=True"
    if constants.HF_HUB_OFFLINE:
        return f"{start}; run it once with a network and without HF_HUB_OFFLINE=1"
    cause = error.__cause__
    if isinstance(cause, HfHubHTTPError):
        return _http_error(repo_id, cause)
    return f"{start}, and {constants.ENDPOINT} gave no answer ({cause or error}); check the network and run it again"


def _not_found(repo_id: str) -> str:
    from huggingface_hub import constants

    return (
        f"there is no directory {repo_id!r} here, and no repository of this name on the hub ({constants.ENDPOINT}) "
        "that you may read. Check the name; for a private repository, log in with `hf auth login`, or give token="
    )


def _http_error(repo_id: str, error: Any) -> str:
    from huggingface_hub import constants

    status = error.response.status_code
    if status == _UNAUTHORISED:  # the hub's answer for a missing repository, too, as long as nobody is logged in
        return _not_found(repo_id)
    if status == _REFUSED:
        return (
            f"{repo_id}: {constants.ENDPOINT} refuses access (status {status}). Log in with `hf auth login`, or give "
            "token=, with a token that has the permission for this repository"
        )
    return f"{repo_id}: {constants.ENDPOINT} answered with status {status} ({error}); run it again later"


# -- uploading ---------------------------------------------------------------------------------------------------------


def push(
    repo_id: str,
    write: Callable[[Path], None],
    *,
    commit_message: str,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = None,
    tags: list[str] | None = None,
) -> Any:
    """Upload files to a model repository in one commit.

    The repository is created if it does not exist. Its files that are not written stay, except the state of a prompt
    encoder of an older adapter. A model card that is there already stays, with the new tags.

    Args:
        repo_id: "name" or "owner/name".
        write: A function that writes the files into an empty folder.
        commit_message: First line of the commit's message.
        commit_description: The rest of the message.
        private: True for a private repository; None for the owner's default. Only for a new repository.
        token: A token, True for the stored one; None for the stored one if there is one.
        revision: Branch to commit to, created if it does not exist; None for the main branch.
        create_pr: True opens a pull request in place of a commit.
        max_shard_size: Only transformers' default, because files are never split.
        tags: Tags to add to the model card.

    Returns:
        `huggingface_hub.CommitInfo`: a string, the commit's URL, with `pr_url` for a pull request.

    Raises:
        CheckpointError: The hub refuses the upload or cannot be reached; nothing is changed there.
        ConfigError: `max_shard_size` asks for several files.
    """
    if max_shard_size not in (None, "50GB", "5GB"):
        raise ConfigError(
            f"push_to_hub: max_shard_size={max_shard_size!r:.200} is not supported, because an adapter is saved as one "
            "file; leave it out"
        )
    from huggingface_hub import CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=token, user_agent=_user_agent())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder)
        with _upload_explained(repo_id):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/pr"):
                try:
                    api.create_branch(repo_id, branch=revision, exist_ok=True)
                except HfHubHTTPError as error:
                    # whoever may only open a pull request cannot make a branch, and the branch may be there
                    if not (create_pr and error.response.status_code == _REFUSED):
                        raise
            _keep_card(api, repo_id, folder, revision, tags)
            outdated = [
                CommitOperationDelete(path_in_repo=path)
                for path in _prompt_states_without_file(folder)
                if api.file_exists(repo_id, path, revision=revision)
            ]
            return api.create_commit(
                repo_id,
                operations=[*_additions(folder), *outdated],
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )


def _additions(folder: Path) -> list[Any]:
    from huggingface_hub import CommitOperationAdd

    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [CommitOperationAdd(file.relative_to(folder).as_posix(), file) for file in files]


def _prompt_states_without_file(folder: Path) -> list[str]:
    adapters = {file.parent for file in folder.rglob(WEIGHTS_NAME)}
    absent = [directory / PROMPT_STATE for directory in sorted(adapters) if not (directory / PROMPT_STATE).exists()]
    return [path.relative_to(folder).as_posix() for path in absent]


def _keep_card(api: Any, repo_id: str, folder: Path, revision: str | None, tags: list[str] | None) -> None:
    """Put the repository's model card in place of the written one, and add tags."""
    from huggingface_hub import ModelCard

    card = folder / _CARD
    if api.file_exists(repo_id, _CARD, revision=revision):
        shutil.copy(api.hf_hub_download(repo_id, _CARD, revision=revision), card)
    if tags and card.exists():
        loaded = ModelCard.load(card)
        data: Any = loaded.data
        data.tags = sorted({*(data.tags or []), *tags})
        loaded.save(card)


@contextmanager
def _upload_explained(repo_id: str) -> Iterator[None]:
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.LocalTokenNotFoundError as error:
        raise CheckpointError(f"{repo_id}: an upload needs a token; log in with `hf auth login`") from error
    except errors.OfflineModeIsEnabled as error:
        raise CheckpointError(f"{repo_id}: nothing is uploaded while HF_HUB_OFFLINE=1 is set; unset it") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repo_id}: the revision does not exist ({error}); give the name of a branch") from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{error}; give a hub id such as 'owner/name'") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (_UNAUTHORISED, _REFUSED):
            raise CheckpointError(
                f"{repo_id}: {constants.ENDPOINT} refuses the upload (status {status}). Log in with `hf auth login`, "
                "or give token=, with a token that may write to this repository"
            ) from error
        raise CheckpointError(
            f"{repo_id}: the upload failed with status {status} ({error}); run it again later"
        ) from error
    except _connection_error() as error:
        raise CheckpointError(
            f"{repo_id}: the connection to {constants.ENDPOINT} failed ({error}); check the network and run it again"
        ) from error


def push_directory(directory: str | os.PathLike[str], repo_id: str, **options: Any) -> Any:
    """Upload the adapter of a local directory.

    Only the adapter's own files and its model card are uploaded, not what else is in the directory.

    Args:
        directory: The adapter's directory.
        repo_id: "name" or "owner/name".
        options: Options of `push`.

    Returns:
        See `push`.

    Raises:
        CheckpointError: The directory holds no complete adapter, or the hub refuses the upload.
    """
    source = whole_files(Path(directory))
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (source / name).is_file():
            raise CheckpointError(f"no {name} in {directory}; give the directory that save_pretrained wrote")

    def write(folder: Path) -> None:
        for name in (CONFIG_NAME, WEIGHTS_NAME, PROMPT_STATE, MANIFEST):
            if (source / name).is_file():
                shutil.copy(source / name, folder / name)
        for place in (source, Path(directory)):
            if (place / _CARD).is_file():
                shutil.copy(place / _CARD, folder / _CARD)

    options.setdefault("commit_message", "Upload adapter")
    return push(repo_id, write, **options)
