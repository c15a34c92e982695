"""Makes a folder a project of its own (`peftcore init`), and brings its files up to date (`peftcore upgrade`).

A folder `projects/NAME` of a git repository becomes one of several projects: with a DVC repository, parameters and
versions of its own, and the git repository of all.

Everything is checked before the first file is written, and no file that exists is overwritten without `force`.
"""

import copy
import difflib
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from flows.data.files import HIDDEN, SHOWN, is_hidden, why_unread
from flows.errors import ParamsError, RepositoryError
from flows.params import Params, load_params, read_some
from flows.params.data import DEMONSTRATION, MIXTURE, source_names
from flows.params.section import HUB, Section
from flows.paths import Paths
from flows.project.presets import Hardware, Task, preset
from flows.runtime.git import GitError, git_output
from flows.runtime.project import PROJECTS, dvc, project_roots
from flows.runtime.stage_code import FILE as STAGES
from flows.runtime.stage_code import stage_file
from flows.runtime.stage_dependencies import PACKAGES, module_of
from peftcore.errors import require_extra
from peftcore.files import file_written_atomically, write_atomically

logger = logging.getLogger("flows.project")
SUFFIXES = (".jsonl", ".csv", ".parquet")
_MORE_SUFFIXES = {"text": (".txt",), "token_classification": (".conll",)}
"""{data.kind: further suffixes of its files}"""
SCHEMA = ".peftcore/params.schema.json"
WORKFLOW = ".github/workflows/gate.yml"
OWNED = ("dvc.yaml", STAGES, SCHEMA, WORKFLOW)
"""Files that `peftcore upgrade` writes again."""
_OF_EDITORS = (".DS_Store", "._*", ".ipynb_checkpoints/")
"""Hidden files of macOS and Jupyter, which would make the folder of the data a changed one."""
IGNORED = {
    ".gitignore": (
        "/artifacts",
        "/checkpoints/",
        "/reports/",
        "/wandb/",
        "/mlruns/",
        "/mlflow.db",
        "/tensorboard/",
        "/.prefect/",
        "/.dvc-remote/",
        ".venv/",
        "__pycache__/",
        *_OF_EDITORS,
    ),
    ".dvcignore": (".venv/", "__pycache__", *_OF_EDITORS),
}
"""{file: lines that it must have}; an existing file gets the lines that it lacks."""
DVC_CONFIG = """\
[core]
    analytics = false
    check_update = false
    autostage = false
    remote = local
['remote "local"']
    url = ../.dvc-remote
    verify = true
"""
PIPELINE_HEADER = """\
# Stages of the pipeline, written by `peftcore init`. `peftcore run` runs each stage as a Prefect task; `dvc repro` runs
# the same stages without Prefect. `.peftcore/stages.yaml` stands for the code of the stages: an upgrade of peftcore
# reruns those whose code has changed. `peftcore upgrade` brings this file up to date.
"""
SCHEMA_LINE = f"# yaml-language-server: $schema={SCHEMA}\n"


@dataclass(frozen=True)
class NewProject:
    """Name, data, base, task and hardware of a new project.

    Raises:
        ParamsError: The name cannot be one of the registry.
    """

    name: str
    """Name of the adapter in the registry."""
    data: str
    """A .jsonl, .csv or .parquet file or a folder of them, from the current folder; hub:NAME[@REVISION];
    stdlib:docstrings; or mixture, with `data.mixture` in `values`."""
    base: str
    """Base model, as `base.source` of params.yaml."""
    task: Task
    hardware: Hardware
    values: Mapping[str, Any] = field(default_factory=dict)
    """{section.key: value} of parameters in place of those of the task and hardware."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", self.name):
            raise ParamsError(
                f"the name {self.name!r} must begin with a lower-case letter and have only lower-case letters, digits "
                "and hyphens; give --name"
            )


def name_from(folder: Path) -> str:
    """Return a project's name that is made of the folder's name; "adapter" if nothing is left of it."""
    return re.sub(r"^[^a-z]+|[^a-z0-9]+$", "", re.sub(r"[^a-z0-9]+", "-", folder.name.lower())) or "adapter"


def create_project(root: Path, project: NewProject, force: bool = False) -> list[str]:
    """Write the files of a project into a folder, and make it a git and DVC repository if it is none.

    Args:
        root: An existing folder.
        project: What the project is about.
        force: Overwrite files that exist.

    Returns:
        The paths that were written, relative to `root`.

    Raises:
        RepositoryError: The folder is inside of another project or git repository, or files exist; nothing is written.
        ParamsError: The data, the base or the name cannot be used; nothing is written.
        MissingExtraError: DVC is not installed; nothing is written.
    """
    require_extra("pipeline", "`peftcore init`", "dvc")
    is_nested = _check_place(root)
    _check_name_is_free(root, project.name)
    _check_base(root, project.base)
    project, copied = _with_data_in(root, project)
    remote = _default_remote(root)
    _check_params(params := params_text(project, remote))
    files: dict[str, str | bytes] = {
        "params.yaml": params,
        "dvc.yaml": (pipeline := pipeline_text(project.name)),
        STAGES: stage_file(_stages(pipeline)),
        SCHEMA: schema_text(),
        **_workflow(is_nested),
    }
    existing = [name for name in (*files, *copied) if (root / name).exists()]
    if existing and not force:
        raise RepositoryError(f"{', '.join(existing)} exist in {root}; --force overwrites them")
    _check_writable(root, [*files, *copied, *IGNORED, "data/README.md"])
    written = list[str]()
    if not is_nested and not (root / ".git").exists():
        git_output(root, "init", "--quiet")
    if not (root / ".dvc").is_dir():
        dvc(root, "init", "--quiet", *(["--subdir"] if is_nested else []))
        # before the data, whose copy may fail: without a remote this command could not be repeated
        write_atomically(root / ".dvc" / "config", DVC_CONFIG)
        written.append(".dvc/config")
    if not (root / "README.md").exists():
        files["README.md"] = readme_text(project)
    for name, lines in IGNORED.items():
        files[name] = _with_lines(root / name, lines)
    for name, file in copied.items():
        with file_written_atomically(root / name) as target:
            shutil.copyfile(file, target)
    (root / "data").mkdir(exist_ok=True)
    if not any((root / "data").iterdir()):  # git keeps no empty folder, and the prepare stage depends on this one
        files["data/README.md"] = "Put the training data here, and name it in `data.source` of params.yaml.\n"
    for name, content in files.items():
        write_atomically(root / name, content)
    return [*written, *copied, *files]


def values_of(file: Path) -> dict[str, Any]:
    """Return {section.key: value} of a YAML file with some of the keys of params.yaml.

    Relative sources of data start from the file's folder and become absolute.

    Raises:
        ParamsError: The file cannot be read, or has an unknown key or a wrong value.
    """
    values = dict(_leaves(read_some(file, Params), Params(), ""))
    if (source := values.get("data.source")) is not None:
        values["data.source"] = _absolute(source, file.resolve().parent)
    if mixture := values.get("data.mixture"):
        values["data.mixture"] = [one | {"source": _absolute(one["source"], file.resolve().parent)} for one in mixture]
    return values


def _absolute(source: str, folder: Path) -> str:
    """Return a source of data with its path from `folder`; one that is no path stays as it is."""
    if source in (DEMONSTRATION, MIXTURE) or re.fullmatch(HUB, source):
        return source
    return str(folder / Path(source).expanduser())


def _leaves(values: Mapping[str, Any], section: Section, before: str) -> Iterator[tuple[str, Any]]:
    """Yield (section.key, value) of the keys below a section that are no sections themselves."""
    for key, value in values.items():
        inner = getattr(section, key)
        if isinstance(inner, Section):
            yield from _leaves(value, inner, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def upgraded_files(root: Path) -> dict[str, str]:
    """Return {path: new text} of the files of `OWNED` that differ from what the installed version writes.

    params.yaml is one of them if it lacks keys that stages track.

    Raises:
        ParamsError: params.yaml cannot be used.
    """
    params = load_params(Paths(root).params)
    pipeline = pipeline_text(params.project.name)
    new = {
        "params.yaml": _with_tracked_keys(Paths(root).params.read_text(encoding="utf-8"), params, _stages(pipeline)),
        "dvc.yaml": pipeline,
        STAGES: stage_file(_stages(pipeline)),
        SCHEMA: schema_text(),
        **_workflow(is_nested=not (root / ".git").exists()),
    }
    return {
        name: text
        for name, text in new.items()
        if not (root / name).is_file() or (root / name).read_text(encoding="utf-8") != text
    }


def _with_tracked_keys(text: str, params: Params, stages: Mapping[str, Any]) -> str:
    """Return params.yaml with the keys that stages track and the file lacks: DVC stops at an absent one.

    Args:
        text: The file's text.
        params: Its values, with the defaults of absent keys.
        stages: The stages of dvc.yaml.
    """
    yaml, defaults, added = _yaml(), params.model_dump(), False
    values, template = yaml.load(text), yaml.load(_template("params.yaml"))
    for key in [key for stage in stages.values() for key in stage.get("params", []) if isinstance(key, str)]:
        *sections, last = key.split(".")
        section, default, model = values, defaults, template
        for name in sections:
            if name not in section:
                _insert(section, name, CommentedMap(), model)
            section, default, model = section[name], default[name], model[name]
        if last not in section:
            _insert(section, last, default[last], model)
            added = True
    return _dumped(yaml, values) if added else text


def _insert(section: CommentedMap, key: str, value: Any, model: CommentedMap) -> None:
    """Insert a key at its place among the keys of `model`, with its comments there."""
    names = list(model)
    before = [name for name in names[: names.index(key)] if name in section]
    if isinstance(value, Mapping):
        keys, value = value, CommentedMap()
        for name in model[key]:
            if name in keys:
                _insert(value, name, keys[name], model[key])
    place = list(section).index(before[-1]) + 1 if before else 0
    end = section.ca.items.get(before[-1], [None] * 3)[2] if place == len(section) and before else None
    section.insert(place, key, value)
    if (comment := model.ca.items.get(key)) is None or section.fa.flow_style():
        return
    section.ca.items[key] = copy.deepcopy(comment)
    if end is not None and end.value.endswith("\n\n") and (token := section.ca.items[key][2]) is not None:
        # the empty line after a section belongs to the comment of its last key
        text = end.value.rstrip()
        token.value, end.value = token.value.rstrip() + end.value[len(text) :], f"{text}\n"


def difference(root: Path, files: dict[str, str]) -> str:
    """Return a unified diff from the files of a project to their new texts."""
    parts = []
    for name, text in files.items():
        old = (root / name).read_text(encoding="utf-8") if (root / name).is_file() else ""
        lines = difflib.unified_diff(old.splitlines(True), text.splitlines(True), f"{name} now", f"{name} new")
        parts.append("".join(lines))
    return "".join(parts)


# -- texts -----------------------------------------------------------------------------------------------------------


def params_text(project: NewProject, remote: str = "local") -> str:
    """Return params.yaml: every key with its comment, and the values of the preset.

    Args:
        project: What the project is about, with its data as a path in its folder.
        remote: The DVC remote to which versions are pushed.
    """
    yaml = _yaml()
    values = yaml.load(_template("params.yaml"))
    given = {
        **preset(project.task, project.hardware),
        "tracking.project": project.name,
        **project.values,
        "project.name": project.name,
        "base.source": project.base,
        "data.source": project.data,
        "register.remote": remote,
    }
    for key, value in given.items():
        *sections, last = key.split(".")
        section = values
        for name in sections:
            section = section[name]
        section[last] = value
    return SCHEMA_LINE + _dumped(yaml, values)


def pipeline_text(name: str) -> str:
    """Return dvc.yaml for a project with an installed peftcore.

    Args:
        name: The project's name, under which the adapter is declared as an artifact.
    """
    yaml = _yaml()
    pipeline = yaml.load(_template("pipeline.yaml"))
    for stage, content in pipeline["stages"].items():
        if "deps" in content:
            content["deps"] = [dep for dep in content["deps"] if dep.partition("/")[0] not in PACKAGES]
            if not content["deps"]:
                del content["deps"]
        if module_of(content) is not None:
            if "params" not in content:
                content.insert(1, "params", [])
            content["params"].append({STAGES: [f"stages.{stage}"]})
    (artifact,) = pipeline["artifacts"].values()
    artifact["desc"] = f"Adapter of the project {name}"
    pipeline["artifacts"].clear()
    pipeline["artifacts"][name] = artifact
    text = _dumped(yaml, pipeline)
    return PIPELINE_HEADER + text[re.match(r"(#.*\n)*", text).end() :]  # type: ignore[union-attr]


def schema_text() -> str:
    """Return the JSON schema of params.yaml, with which editors complete and check it."""
    return json.dumps(Params.model_json_schema(), indent=1) + "\n"


def readme_text(project: NewProject) -> str:
    """Return the README of a project."""
    sources = source_names({"source": project.data, "mixture": project.values.get("data.mixture")})
    text = _template("readme.txt")
    for mark, value in (("NAME", project.name), ("BASE", project.base), ("SOURCE", "`, `".join(sources))):
        text = text.replace(mark, value)
    return text


def _template(name: str) -> str:
    # pipeline.yaml is this repository's dvc.yaml; under that name DVC would read it here as a second pipeline
    return (resources.files("flows.project") / "templates" / name).read_text(encoding="utf-8")


def _workflow(is_nested: bool) -> dict[str, str]:
    """Return {path: text} of the CI workflow; GitHub reads none in a folder of a repository."""
    return {} if is_nested else {WORKFLOW: _template("gate.yml")}


def _yaml() -> YAML:
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 120, True
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(
        type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    return yaml


def _dumped(yaml: YAML, values: Any) -> str:
    stream = io.StringIO()
    yaml.dump(values, stream)
    return stream.getvalue()


def _stages(pipeline: str) -> dict[str, Any]:
    return YAML(typ="safe").load(pipeline)["stages"]


def _with_lines(file: Path, lines: Sequence[str]) -> bytes:
    """Return the content of a file with the lines that it lacks added at its end; the rest keeps its bytes."""
    present = file.read_bytes() if file.is_file() else b""
    known = present.decode(errors="replace").splitlines()
    separator = b"" if not present or present.endswith(b"\n") else b"\n"
    return present + separator + "".join(f"{line}\n" for line in lines if line not in known).encode()


# -- checks ----------------------------------------------------------------------------------------------------------


def _check_place(root: Path) -> bool:
    """Return True for a folder `projects/NAME` of a git repository, False for one that is or will be its own.

    Raises:
        RepositoryError: The folder is part of another project, or elsewhere in a git repository.
    """
    try:
        top = Path(git_output(root, "rev-parse", "--show-toplevel").strip()).resolve()
    except GitError:
        top = root.resolve()
    if root.resolve().parent == top / PROJECTS:
        return True
    for folder in root.resolve().parents:
        if (folder / "dvc.yaml").is_file() and (folder / ".dvc").is_dir():
            raise RepositoryError(f"{root} is inside of the project {folder}; choose a folder outside of it")
    if top != root.resolve():
        raise RepositoryError(
            f"{root} is inside of the git repository {top}; for one of several projects of it choose "
            f"{top / PROJECTS / root.name}, or run this in {top}, or make a repository of its own here with `git init`"
        )
    return False


def _check_writable(root: Path, names: Sequence[str]) -> None:
    """Raise RepositoryError if a file cannot be written in the folder, because of another file or of permissions."""
    for name in names:
        place = root / name
        if place.is_dir():
            raise RepositoryError(f"{place} is a folder, and `peftcore init` writes a file there; rename the folder")
        while not place.exists():
            place = place.parent
        # the last existing part is the file itself, or a folder above it
        if place != root / name and not place.is_dir():
            raise RepositoryError(f"{place} is a file, and `peftcore init` needs a folder there; rename the file")
        folder = place if place.is_dir() else place.parent
        if not os.access(folder, os.W_OK | os.X_OK):
            raise RepositoryError(f"{folder} cannot be written; make it writable, or choose another folder")


def _check_name_is_free(root: Path, name: str) -> None:
    """Raise ParamsError if another project of the git repository has the name: their versions would be mixed up."""
    try:
        others = [one for one in project_roots(root) if one != root.resolve()]
    except RepositoryError:  # no git repository, or no other project
        return
    for other in others:
        if load_params(Paths(other).params).project.name == name:
            raise ParamsError(f"the name {name!r} is that of the project {other}; give another --name")


def _check_base(root: Path, base: str) -> None:
    """Raise ParamsError if a `path:` names nothing; a relative one starts from the project's folder."""
    kind, _, name = base.partition(":")
    if kind == "path" and not (place := root / Path(name).expanduser()).exists():
        raise ParamsError(f"--base {base}: there is no {place}; give a model folder, a .gguf file, or hub:NAME")


def _check_params(text: str) -> None:
    """Raise ParamsError if a text is no valid params.yaml, for example because of the name of the base."""
    with TemporaryDirectory(prefix="peftcore-init-") as folder:
        file = Path(folder) / "params.yaml"
        file.write_text(text, encoding="utf-8")
        try:
            load_params(file)
        except ParamsError as error:
            # nobody has this file, so its lines tell nothing
            problems = re.sub(r"^params\.yaml:\d+: ", "", str(error), flags=re.MULTILINE)
            raise ParamsError(f"the options and files do not make a valid params.yaml: {problems}") from error


def _with_data_in(root: Path, project: NewProject) -> tuple[NewProject, dict[str, Path]]:
    """Return the project with its data as paths in its folder, and {path in the project: file to copy there}."""
    if project.data != MIXTURE:
        source, copied = _data_source(root, project.data, project.task)
        return replace(project, data=source), copied
    mixture, copied = [], {}
    for one in project.values.get("data.mixture", []):
        source, files = _data_source(root, one["source"], project.task)
        for name in files.keys() & copied.keys():
            if files[name] != copied[name]:
                raise ParamsError(f"data.mixture: {files[name]} and {copied[name]} would both be {name}; rename one")
        copied |= files
        mixture.append(one | {"source": source})
    return replace(project, values={**project.values, "data.mixture": mixture}), copied


def _data_source(root: Path, data: str, task: Task) -> tuple[str, dict[str, Path]]:
    """Return `data.source`, and {path in the project: file} of the files to copy into the project's folder `data`."""
    if data == DEMONSTRATION or re.fullmatch(HUB, data):
        return data, {}
    path = Path(data).expanduser().resolve()
    files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    suffixes = (*SUFFIXES, *_MORE_SUFFIXES.get(task, ()))
    unread = [f"{file.name}: {advice}" for file in files if (advice := why_unread(file)) is not None]
    files = [file for file in files if file.suffix.lower() in suffixes]
    if hidden := [file for file in files if is_hidden(file.relative_to(path).as_posix())]:
        unread.append(f"{', '.join(file.name for file in hidden[:SHOWN])}: {HIDDEN}")
        files = [file for file in files if file not in hidden]
    if not files:
        raise ParamsError(
            f"training data {data}: there is no {', '.join(suffixes)} file at {path}; "
            + ("; ".join(unread[:SHOWN]) or "give such a file, a folder of them, or hub:NAME")
        )
    inside = (root / "data").resolve()  # it may be a link to another disk
    if path.is_relative_to(inside):
        return (Path("data") / path.relative_to(inside)).as_posix(), {}
    for advice in unread:
        logger.warning("training data %s: not copied: %s", data, advice)
    folder = path if path.is_dir() else path.parent
    target = Path("data") / path.name
    if path.is_file():
        return target.as_posix(), {target.as_posix(): path}
    return target.as_posix(), {(target / file.relative_to(folder)).as_posix(): file for file in files}


def _default_remote(root: Path) -> str:
    """Return the default DVC remote of a repository that has DVC already; "local" for a new one."""
    if not (root / ".dvc").is_dir():
        return "local"
    from dvc.config import Config

    here: Any = Config(str(root / ".dvc"), validate=False)
    remote = here["core"].get("remote")
    if remote is None:
        raise RepositoryError(
            f"{root / '.dvc'} has no default remote, to which versions are pushed; add one with "
            "`dvc remote add --default NAME URL`"
        )
    return str(remote)
