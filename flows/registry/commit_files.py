"""Files of a version's commit: input data, which a rebuild needs, and credentials, which must never be committed."""

import configparser
import re
from pathlib import Path

from flows.errors import RepositoryError
from flows.params import source_names
from flows.paths import Paths
from flows.registry.lineage import read_json
from flows.runtime.git import Git, GitError

DATA = "data"
"""Folder of training data, which the prepare stage depends on."""
DVC_CONFIG = ".dvc/config"
LARGEST = 8 << 20
"""Largest total size (bytes) of untracked data files in a version's commit; larger files belong to DVC."""
SECRETS = frozenset(
    [
        "access_key_id",
        "secret_access_key",
        "session_token",
        "account_key",
        "connection_string",
        "sas_token",
        "client_secret",
        "oss_key_id",
        "oss_key_secret",
        "gdrive_client_secret",
        "password",
        "passphrase",
        "token",
        "custom_auth_header",
    ]
)
"""Options of DVC's configuration that hold credentials."""


def check_no_secrets(git: Git, root: Path) -> None:
    """Check that `.dvc/config`, which every version's commit takes, has no uncommitted credentials.

    Raises:
        RepositoryError: an option holds a credential; the error names the option and says where it belongs.
    """
    path = root / DVC_CONFIG
    if not path.exists():
        return
    try:
        committed = _credentials(git.show("HEAD", DVC_CONFIG))
    except GitError:  # not committed yet
        committed = {}
    present = _credentials(path.read_text(encoding="utf-8"))
    if leaking := sorted(name for name, value in present.items() if committed.get(name) != value):
        raise RepositoryError(
            f"{DVC_CONFIG} holds {', '.join(leaking)}, and registering a version would commit and push it; move it to "
            f"{DVC_CONFIG}.local, which git ignores (`dvc remote modify --local REMOTE OPTION VALUE`), and remove it "
            f"from {DVC_CONFIG}"
        )


def _credentials(text: str) -> dict[str, str]:
    """Return {section.option: value} of the credentials in a DVC configuration."""
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        parser.read_string(text)
    except configparser.Error as error:
        raise RepositoryError(f"{DVC_CONFIG} cannot be read: {error}") from error
    credentials = {}
    for section in parser.sections():
        for option, value in parser.items(section):
            if option in SECRETS or re.search(r"://[^/@\s]*:[^/@\s]+@", value):
                credentials[f"{section.strip(chr(39))}.{option}"] = value
    return credentials


def data_files(paths: Paths, git: Git) -> tuple[list[str], list[str]]:
    """Return the untracked data files to commit, and the data's `.dvc` files whose content is to be pushed.

    Returns:
        (untracked files that git does not ignore, `.dvc` files), as paths relative to the repository.

    Raises:
        RepositoryError: the untracked files are too large for a git commit.
    """
    places = [DATA] if (paths.root / DATA).is_dir() else []
    report = read_json(paths.data_report)
    for name in source_names(report | {"mixture": [*report.get("mixture", {}).values()]}):
        source = paths.root / Path(name).expanduser()
        if source.exists() and source.resolve().is_relative_to(paths.root.resolve()):
            places.append(source.resolve().relative_to(paths.root.resolve()).as_posix())
    if not places:
        return [], []
    listed = git.run("ls-files", "-z", "--others", "--exclude-standard", "--", *places)
    untracked = sorted({name for name in listed.split("\0") if name})
    sizes = {name: (paths.root / name).lstat().st_size for name in untracked}
    if sum(sizes.values()) > LARGEST:
        largest = max(sizes, key=lambda name: sizes[name])
        raise RepositoryError(
            f"git does not track {len(sizes)} data files with {sum(sizes.values()) / 2**20:.0f} MiB (the largest is "
            f"{largest}), and a version's commit takes {LARGEST >> 20} MiB at most; run `dvc add {largest}`, so that "
            "DVC keeps it and the version can be built again"
        )
    pointers = [place for folder in places for place in sorted((paths.root / folder).rglob("*.dvc"))]
    pointers += [place for folder in places if (place := paths.root / f"{folder}.dvc").exists()]
    return untracked, sorted({place.relative_to(paths.root).as_posix() for place in pointers if place.is_file()})
