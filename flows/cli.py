"""The command line `peftcore`. Heavy libraries are imported by the command that needs them, once the environment
that they read is quiet; an error is one message and exit status 1.
"""

import json
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.errors import PipelineError, RegistryError, StageError
from flows.exporting import Format
from flows.params import Params, load_params
from flows.paths import Paths
from flows.project import find_root, set_prefect_environment, stage_order, stage_states
from flows.promotion.gate import Check
from flows.stage import fail, is_disk_full, set_quiet_environment
from peftcore.errors import PeftError
from peftcore.files import write_atomically

if TYPE_CHECKING:
    from flows.promotion.registry import Registry

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="From data to a promoted adapter: a pipeline of DVC stages, a registry of git tags, a gate between them.",
)
registry_app = typer.Typer(no_args_is_help=True, help="The registered versions, and which of them has which stage.")
app.add_typer(registry_app, name="registry")

SIX_HOURS = 6 * 3600.0
SHOWN = 4
"""Changes of a stage that `status` names."""
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
PushTo = Annotated[
    str | None,
    typer.Option(
        "--push-to",
        metavar="REMOTE",
        help="Also push the tags to this git remote, which then decides between several clones: if somebody else "
        "promoted first, nothing is promoted here.",
    ),
]

AdapterFolder = Annotated[
    Path | None,
    typer.Option(exists=True, file_okay=False, help="The adapter's directory; the pipeline's own if left out."),
]
BaseFolder = Annotated[
    Path | None,
    typer.Option(exists=True, file_okay=False, help="The base model's folder; the pipeline's own if left out."),
]


@app.callback()
def _prepare() -> None:
    set_quiet_environment()


@app.command()
def run(
    stage_timeout: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="Stop a stage that takes longer.")
    ] = SIX_HOURS,
    push_to: PushTo = None,
) -> None:
    """Run the whole pipeline: only stages whose parameters, code or inputs changed; then the gate and the page.

    The stages are those of `dvc.yaml`, their parameters those of `params.yaml`. Prefect drives them with a server
    of its own that ends with the run; `dvc repro` runs the same stages without it. Interrupt it when you like:
    training goes on from its last checkpoint. Exits with 1 if a stage fails or the gate refuses.
    """
    with _errors(), _project() as (_, paths):
        set_prefect_environment(paths.root)
        from flows.pipeline import run_pipeline

        run_pipeline(paths.root, stage_timeout, push_to)


@app.command()
def stage(
    name: Annotated[str, typer.Argument(help="A stage of dvc.yaml, such as `train`.")],
    force: Annotated[bool, typer.Option("--force", help="Run it even if nothing changed.")] = False,
    stage_timeout: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="Stop it if it takes longer.")
    ] = SIX_HOURS,
) -> None:
    """Run one stage on what the stages before it have left, if its parameters, code or inputs changed."""
    from flows.stage_process import run_stage

    with _errors(), _project() as (_, paths):
        stages = stage_order(paths.root)
        if name not in stages:
            raise StageError(f"there is no stage {name!r} in dvc.yaml; there is: {', '.join(stages)}")
        run_stage(paths.root, name, stage_timeout, force)


@app.command()
def status(as_json: AsJson = False) -> None:
    """Which stages are up to date, what changed for the others, and which version has which stage."""
    with _errors(), _project() as (params, paths):
        stages = stage_states(paths.root)
        holders = _holders(params, paths)
        if as_json:
            print(json.dumps({"stages": stages, "registry": holders}, indent=2))
            return
        table = Table("stage", "state")
        for name, changes in stages.items():
            more = f" and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
            words = ", ".join(changes[:SHOWN]) + more
            table.add_row(name, f"[yellow]{escape(words)}[/]" if changes else "[green]up to date[/]")
        console = Console(highlight=False)
        console.print(table)
        console.print(_registry_line(params.project.name, holders))


@app.command()
def plan(
    config: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, metavar="FILE", help="A model's config.json; the model need not be here."
        ),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Train two shallow models of the real widths for a few steps.")
    ] = True,
    probe_timeout: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="Stop a process of the probe that takes longer.")
    ] = 600.0,
    as_json: AsJson = False,
) -> None:
    """How much memory, time and disk training will take, and what would make it fit, before anything is trained.

    Weights are counted and activations simulated without making any, from `params.yaml`, the base's configuration and
    the prepared rows (full ones where none are prepared); the probe measures the rest and the time. Exits with 1 if
    the run will not fit this machine.
    """
    with _errors(), _project() as (params, paths):
        from flows.planning.plan import plan as make_plan
        from flows.planning.table import print_plan

        planned = make_plan(params, paths, config, probe, probe_timeout)
        if as_json:
            print(json.dumps(planned.as_dict(), indent=2))
        else:
            print_plan(planned)
        if not planned.fits:
            fail(planned.refusal())


@registry_app.command("list")
def registry_list(as_json: AsJson = False) -> None:
    """All registered versions, the newest first, with their test loss and stages."""
    from flows.git import Git
    from flows.promotion.registry import Registry

    with _errors(), _project() as (params, paths):
        registry = Registry(Git(paths.root), params.project.name)
        holders = registry.stages().values()
        rows = []
        for version in reversed(registry.versions()):
            stages = [holder.stage for holder in holders if holder.version == version.number]
            created = datetime.fromtimestamp(version.created, UTC).isoformat(timespec="seconds")
            title = version.message.split("\n", 1)[0].partition(": ")[2]
            rows.append({"version": version.number, "created": created, "stages": stages, "summary": title})
        if as_json:
            print(json.dumps(rows, indent=2))
            return
        table = Table("version", "created", "stage", "summary", title=registry.name, title_justify="left")
        for row in rows:
            table.add_row(row["version"], row["created"], ", ".join(row["stages"]), escape(row["summary"]))
        Console(highlight=False).print(table if rows else f"no version of {registry.name} yet; use `peftcore run`")


@registry_app.command("show")
def registry_show(
    version: Annotated[str | None, typer.Argument(help="Its number, as v0.1.0; the newest if left out.")] = None,
) -> None:
    """The lineage record of one version, as JSON: code, data, parameters, metrics, hashes of every file."""
    from flows.git import Git
    from flows.promotion.registry import Registry

    with _errors(), _project() as (params, paths):
        registry = Registry(Git(paths.root), params.project.name)
        print(json.dumps(registry.record(registry.version(version or _newest(registry))), indent=2))


@registry_app.command("diff")
def registry_diff(
    before: Annotated[str, typer.Argument(help="A version, as v0.1.0, or the name of a stage.")],
    after: Annotated[str | None, typer.Argument(help="Another; the newest if left out.")] = None,
    as_json: AsJson = False,
) -> None:
    """What differs between two versions: figures, parameters, data, base, code and software."""
    from flows.git import Git
    from flows.promotion.comparison import differences
    from flows.promotion.registry import Registry

    with _errors(), _project() as (params, paths):
        registry = Registry(Git(paths.root), params.project.name)
        holders = _holders(params, paths)
        one, other = (registry.version(holders.get(name) or name) for name in (before, after or _newest(registry)))
        found = differences(registry.record(one), registry.record(other))
        if as_json:
            rows = [difference._asdict() | {"change": difference.change} for difference in found]
            print(json.dumps({"before": one.number, "after": other.number, "differences": rows}, indent=2))
            return
        table = Table("", "", one.number, other.number, "change", title=registry.name, title_justify="left")
        for difference in found:
            shown = ["" if value is None else escape(_short(value)) for value in (difference.before, difference.after)]
            change = "" if difference.change is None else f"{difference.change:+.4g}"
            table.add_row(difference.part, escape(difference.key), *shown, change)
        same = f"{one.number} and {other.number} differ in nothing that was recorded"
        Console(highlight=False).print(table if found else same)


@app.command()
def promote(
    version: Annotated[
        str | None, typer.Option(metavar="vX.Y.Z", help="Which version; that of the last run if left out.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Judge only; change nothing.")] = False,
    as_json: AsJson = False,
    markdown: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the verdict and its checks there too, for a pull request."),
    ] = None,
    push_to: PushTo = None,
) -> None:
    """Judge a version by the gate and, if it passes, give it the stage `gate.stage` of `params.yaml`.

    The gate's checks, in order: only allowed files; their registered SHA-256; finite weights; the thresholds of
    `params.yaml`; better than the version that has the stage now (a paired bootstrap on the same test rows), and in no
    slice of them worse than allowed; the adapter's size; a faithful merge. The first that fails is the reason. Exits
    with 1 if it refuses, or if somebody else promoted meanwhile.
    """
    with _errors(), _project() as (params, paths):
        from flows.promotion.promote import promote as promote_version
        from flows.promotion.report import as_markdown

        promotion = promote_version(params, paths, version, dry_run, push_to)
        if markdown is not None:
            write_atomically(markdown, as_markdown(promotion))
        if as_json:
            print(json.dumps(promotion.as_dict(), indent=2))
        else:
            _print_checks(promotion.report.checks if promotion.report else ())
            if promotion.accepted:
                print(promotion.sentence)
        if not promotion.accepted:
            fail(promotion.sentence)


@app.command()
def rollback(
    reason: Annotated[str, typer.Option(help="Why; the tag keeps it.")],
    to: Annotated[
        str | None, typer.Option(metavar="vX.Y.Z", help="Which earlier one; the last before this if left out.")
    ] = None,
    as_json: AsJson = False,
    push_to: PushTo = None,
) -> None:
    """Give the stage `gate.stage` back to a version that had it before, at once and without the gate.

    Its files have to be those that were registered. The tag says when, by whom and why, in place of which version, and
    what the gate had said. Exits with 1 if there is none, or if somebody else promoted meanwhile.
    """
    with _errors(), _project() as (params, paths):
        from flows.promotion.promote import roll_back

        promotion = roll_back(params, paths, reason, to, push_to)
        print(json.dumps(promotion.as_dict(), indent=2) if as_json else promotion.sentence)


@app.command()
def doctor(
    rows: Annotated[int, typer.Option(min=0, metavar="N", help="Training rows to show, with what is learned.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Look at the rows that the prepare stage left: what is learned, whether it ends, what leaks between splits.

    Shows rows with their prompt dim and the learned part green (a rejected answer red), then each check with its figure
    and, where something is wrong, what to do. The train stage refuses rows with an error. Exits with 1 if there is one.
    """
    with _errors(), _project() as (params, paths):
        from flows.doctor.examination import examine, load_tokenizer
        from flows.doctor.preview import findings_table, preview

        findings = examine(paths, params)
        if as_json:
            print(json.dumps(findings.as_dict(), indent=2, ensure_ascii=False))
        else:
            console = Console(highlight=False)
            for shown in preview(paths.split("train"), load_tokenizer(paths), params.data.kind, rows):
                console.print(shown)
            console.print(findings_table(findings))
        errors = findings.of("error")
        if errors:
            named = ", ".join(finding.check for finding in errors)
            fail(f"{len(errors)} of {len(findings.findings)} checks found an error: {named}")


@app.command()
def review() -> None:
    """Write the page of the last run again, `reports/review.html`: one file that needs no network."""
    with _errors(), _project() as (params, paths):
        from flows.review.page import write_review

        print(write_review(params, paths))


@app.command()
def export(
    form: Annotated[Format, typer.Argument(metavar="FORMAT", help="`gguf-lora`, `gguf-merged` or `vllm`.")],
    out: Annotated[Path, typer.Argument(help="The file, or for vllm the folder, to write.")],
    adapter: AdapterFolder = None,
    base: BaseFolder = None,
    gguf: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="For gguf-merged: the base as a GGUF file.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of matrices in a GGUF: float32, float16, or bfloat16.")] = "float16",
    rank: Annotated[int | None, typer.Option(min=1, help="Convert it to LoRA of this rank first.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="Convert it to LoRA first, within this relative error per layer.")
    ] = None,
) -> None:
    """Write an adapter for llama.cpp (GGUF), or for vLLM and LoRAX; nothing is written of what they cannot take.

    Without options it is the adapter and the base of the pipeline in this folder.
    """
    with _errors():
        from flows.exporting import export as write

        print(write(form, *_adapter_and_base(adapter, base), out, gguf, dtype, rank, tolerance))


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="The model folder to write; one that is there is replaced.")],
    adapter: AdapterFolder = None,
    base: BaseFolder = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; what the base has if left out.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="nf4 or fp4: merge into the base as training in 4 bits saw it.")
    ] = None,
    double_quant: Annotated[bool, typer.Option("--double-quant", help="As in training in 4 bits.")] = False,
    shard_gb: Annotated[float, typer.Option(min=0.001, metavar="GB", help="Size of one file at most.")] = 5.0,
) -> None:
    """Merge an adapter into its base, shard by shard, with one weight in memory at a time.

    Without options it is the adapter and the base of the pipeline in this folder. The pipeline's own merge stage
    also measures how faithful the merged model is.
    """
    with _errors():
        from peftcore.export import merge_streaming

        folders = _adapter_and_base(adapter, base)
        size = int(shard_gb * 1e9)
        print(merge_streaming(folders[1], folders[0], out, size, dtype, storage, double_quant, progressbar=True))


@app.command()
def serve(
    base: BaseFolder = None,
    adapters: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="A folder of adapters: directories, or .dvc files to pull."),
    ] = None,
    composition: Annotated[
        list[str] | None, typer.Option(metavar="NAME=JSON", help='A model of several: `mix={"sql": 0.7, "chat": 0.3}`.')
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What the base is called; its folder's name if left out.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16; auto: what the base has.")] = "auto",
    max_batch: Annotated[int, typer.Option(min=1, metavar="ROWS", help="Requests decoded together.")] = 16,
    max_queue: Annotated[int, typer.Option(min=1, metavar="N", help="Requests that wait at most.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of one answer at most.")] = 1024,
    max_loaded: Annotated[int, typer.Option(min=1, metavar="N", help="Adapters in the model at a time.")] = 64,
    timeout: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="For one request.")] = 300.0,
    grace: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="For what runs at SIGTERM.")] = 30.0,
    api_key: Annotated[
        list[str] | None, typer.Option(help="One that opens the server; better in PEFTCORE_API_KEYS, comma-separated.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve this project's promoted version too, and each that follows it.")
    ] = False,
    watch_seconds: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Between looks.")] = 5.0,
) -> None:
    """Serve a base with many adapters by OpenAI's HTTP interface: `/v1/chat/completions`, `/v1/completions`.

    A request's `model` names the base, an adapter, or a composition; requests for different ones are decoded in one
    batch. `/health`, `/ready` and `/metrics` (Prometheus) are for whoever watches it. SIGTERM ends it after what runs.
    """
    with _errors():
        from flows.serving import serve as run
        from peftcore.serving import Limits

        logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
        for package in ("flows", "peftcore"):
            logging.getLogger(package).setLevel(logging.INFO)
        watched = None
        if watch:
            paths = Paths(find_root())
            params = load_params(paths.params)
            watched = (paths, params.project.name, params.gate.stage)
        limits = Limits(max_batch, max_queue, max_tokens, timeout=timeout, grace=grace)
        folder, address = base or Paths(find_root()).base, (host, port)
        mixtures, keys = composition or (), api_key or ()
        run(folder, adapters, mixtures, watched, address, limits, name, max_loaded, dtype, keys, watch_seconds)


def _adapter_and_base(adapter: Path | None, base: Path | None) -> tuple[Path, Path]:
    """As given, or those of the pipeline that the current folder belongs to."""
    if adapter is not None and base is not None:
        return adapter, base
    paths = Paths(find_root())
    return adapter or paths.adapter, base or paths.base


@contextmanager
def _errors() -> Iterator[None]:
    """Turn what is refused into one message and an exit status; a bug keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        fail("interrupted; run it again to go on", status=130)
    except (PipelineError, PeftError) as error:
        fail(str(error))
    except OSError as error:
        if not is_disk_full(error):
            raise
        fail(f"the disk is full ({error}); free some space and run it again, what was there before is intact")


@contextmanager
def _project() -> Iterator[tuple[Params, Paths]]:
    """Parameters and paths of the pipeline that the current folder belongs to."""
    root = find_root()
    yield load_params(Paths(root).params), Paths(root)


def _holders(params: Params, paths: Paths) -> dict[str, str | None]:
    from flows.git import Git
    from flows.promotion.registry import Registry

    stages = Registry(Git(paths.root), params.project.name).stages()
    return {stage: holder.version for stage, holder in stages.items()}


def _newest(registry: "Registry") -> str:
    versions = registry.versions()
    if not versions:
        raise RegistryError(f"no version of {registry.name} yet; use `peftcore run`")
    return versions[-1].number


def _short(value: object) -> str:
    """A value for one cell: a float to four digits that count, a digest by its first ones."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 24 else f"{text[:21]}..."


def _registry_line(name: str, holders: dict[str, str | None]) -> str:
    if not holders:
        return f"{name}: nothing is promoted yet"
    return f"{name}: " + ", ".join(
        f"{stage} is {version or 'a commit without a version'}" for stage, version in holders.items()
    )


def _print_checks(checks: Iterable[Check]) -> None:
    table = Table("check", "", "found")
    for check in checks:
        table.add_row(check.name, "[green]✓[/]" if check.passed else "[red]✗[/]", escape(check.detail))
    if table.row_count:
        Console(highlight=False).print(table)


if __name__ == "__main__":
    sys.exit(app())
