"""start: what training starts from. Nothing, or the adapter of `train.start_from`, as it was registered."""

import json
import logging
import shutil

from flows.errors import RegistryError
from flows.git import Git
from flows.params import Params
from flows.paths import Paths
from flows.project import files_at
from flows.promotion.registry import Registry
from flows.stage import start
from peftcore.files import damaged_files, directory_written_atomically, read_manifest

logger = logging.getLogger("flows.start")


def run(params: Params, paths: Paths) -> None:
    """Write `paths.start`. Raises RegistryError for a version that is unknown, or is not what was registered."""
    number = params.train.start_from
    with directory_written_atomically(paths.start) as folder:
        (folder / paths.start_source.name).write_text(json.dumps({"version": number}) + "\n")
        if number is None:
            return
        registry = Registry(Git(paths.root), params.project.name)
        version = registry.version(number)
        name = paths.adapter.relative_to(paths.root).as_posix()
        with files_at(paths.root, version.commit, [name]) as at:
            adapter = at / name
            if damaged_files(adapter) or read_manifest(adapter) != registry.record(version)["adapter"]["files"]:
                raise RegistryError(
                    f"train.start_from: the adapter of {version.tag} is not what was registered; `dvc push` it again "
                    "from a machine that has it, or give another version"
                )
            shutil.copytree(adapter, folder / paths.start_adapter.name)
        logger.info("training starts from %s", version.tag)


if __name__ == "__main__":
    start(run)
