"""Commands on an adapter and its base outside of the pipeline: export, merge, serve."""

import json
from pathlib import Path
from typing import Annotated

import typer

from flows.commands.common import (
    AdapterFolder,
    AsJson,
    BaseFolder,
    adapter_and_base,
    errors,
    fetched_base,
    is_calibrated,
    one_document,
    pipeline_base,
    plain_base,
)
from flows.commands.exporting import Format
from flows.paths import Paths
from flows.runtime import logs
from flows.runtime.project import find_root

RECORD_MB = 256.0
"""Size of the records (MB) at which `peftcore serve --record` stops recording."""
WATCH_SECONDS = 5.0
"""Seconds between two checks of `peftcore serve --watch`."""


def export(
    form: Annotated[Format, typer.Argument(metavar="FORMAT", help="`gguf-lora`, `gguf-merged` or `vllm`.")],
    out: Annotated[Path, typer.Argument(help="The file to write; for vllm the folder.")],
    adapter: AdapterFolder = None,
    base: BaseFolder = None,
    gguf: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="For gguf-merged: the base's own GGUF file; default: converted from the base's folder.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Type of the matrices in a GGUF file: float32, float16 or bfloat16; default: float16."),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Convert the adapter to LoRA of this rank first.")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="Convert the adapter to LoRA first, with at most this relative error per layer."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Export an adapter for llama.cpp (GGUF), or for vLLM and LoRAX. An adapter that they cannot load is refused.

    By default the adapter and the base are those of the current folder's pipeline.
    """
    with errors():
        from flows.base.corrected import corrected_storage
        from flows.commands.exporting import check_export
        from flows.commands.exporting import export as write

        of_adapter, of_base = adapter_and_base(adapter, base)
        corrected = corrected_storage(of_adapter)
        check_export(form, gguf, corrected)
        with one_document(as_json), plain_base(of_base, corrected) as plain:
            message = write(form, of_adapter, plain, out, gguf, dtype, rank, tolerance)
        print(json.dumps({"format": form, "path": str(out), "note": message}) if as_json else message)


def merge(
    out: Annotated[Path, typer.Argument(help="The model folder to write; an existing one is replaced.")],
    adapter: AdapterFolder = None,
    base: BaseFolder = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default: the base's type.")] = None,
    storage: Annotated[
        str | None, typer.Option(help="nf4 or fp4: merge into the base with its 4-bit quantisation error.")
    ] = None,
    double_quant: Annotated[
        bool, typer.Option("--double-quant", help="With --storage: double quantisation, as in training.")
    ] = False,
    shard_gb: Annotated[float, typer.Option(min=0.001, metavar="GB", help="Largest size of one file.")] = 5.0,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base, shard by shard, with one weight in memory at a time.

    By default the adapter and the base are those of the current folder's pipeline. The pipeline's own merge stage also
    measures the fidelity of the merged model.
    """
    with errors():
        from flows.base.corrected import corrected_storage
        from peftcore.export import merge_streaming

        folders = adapter_and_base(adapter, base)
        if storage is not None and is_calibrated(folders[1]):
            raise typer.BadParameter(
                f"{folders[1]} is a calibrated base, whose weights are quantised already; leave the option out",
                param_hint="--storage",
            )
        size = int(shard_gb * 1e9)
        bar = not logs.is_quiet()
        corrected = corrected_storage(folders[0]) if storage is None else None
        with one_document(as_json), plain_base(folders[1], corrected) as plain:
            written = merge_streaming(plain, folders[0], out, size, dtype, storage, double_quant, progressbar=bar)
        print(json.dumps({"path": str(written)}) if as_json else written)


def serve(
    base: BaseFolder = None,
    adapters: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="A folder of adapters: directories, or .dvc files to pull."),
    ] = None,
    load_from: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="A folder from which clients may load adapters while the server runs, by /v1/load_lora_adapter.",
        ),
    ] = None,
    composition: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=JSON", help='A weighted sum of adapters: `mix={"sql": 0.7, "chat": 0.3}`.'),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free port.")] = 8000,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            metavar="PORT",
            help="Second port for `/health`, `/ready` and `/metrics` without an API key; 0: any free port.",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Model name of the base; default: its folder's name.")] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            metavar="FILE",
            help="A Jinja chat template in place of the base's, such as one with tools.",
        ),
    ] = None,
    tool_call_parser: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Form of the model's tool calls: hermes, llama3_json or mistral; default: that of the chat template.",
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, float16 or bfloat16; auto: the base's type, or float32 on a CPU without fast 16 bits."
        ),
    ] = "auto",
    adapter_dtype: Annotated[
        str, typer.Option(help="auto: adapters in the base's type; float32: as they were trained, in twice the memory.")
    ] = "auto",
    max_batch: Annotated[int, typer.Option(min=1, metavar="ROWS", help="Largest number of requests per batch.")] = 16,
    max_queue: Annotated[int, typer.Option(min=1, metavar="N", help="Largest number of waiting requests.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Largest number of tokens per answer.")] = 1024,
    max_loaded: Annotated[int, typer.Option(min=1, metavar="N", help="Largest number of loaded adapters.")] = 64,
    prefix_cache: Annotated[
        int,
        typer.Option(min=0, metavar="MIB", help="Memory for beginnings of prompts that are used again; 0: none."),
    ] = 256,
    timeout: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Time limit of one request.")] = 300.0,
    grace: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="Time for running requests after SIGTERM.")
    ] = 30.0,
    api_key: Annotated[
        list[str] | None, typer.Option(help="An API key; safer in PEFTCORE_API_KEYS, separated by commas.")
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Record requests, answers and the ratings of `/v1/feedback` in this folder; default: nothing is "
            "recorded. `peftcore feedback` turns the records into rows.",
        ),
    ] = None,
    record_mb: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            metavar="MB",
            help=f"With --record: size of the records at which recording stops; default: {RECORD_MB:g}.",
        ),
    ] = None,
    redact: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            metavar="FILE",
            help="With --record: a YAML list of what to replace before anything is written: email, card, iban, phone, "
            "ip, or {pattern: ..., replacement: ...}.",
        ),
    ] = None,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            help="Also serve this project's promoted version and its successors, on the base of their evaluation.",
        ),
    ] = False,
    watch_seconds: Annotated[
        float | None,
        typer.Option(
            min=0.1, metavar="SECONDS", help=f"With --watch: time between two checks; default: {WATCH_SECONDS:g}."
        ),
    ] = None,
    watch_remote: Annotated[
        str | None,
        typer.Option(
            metavar="REMOTE",
            help="With --watch: a git remote whose tags are fetched at each check; default: only local tags are read.",
        ),
    ] = None,
) -> None:
    """Serve a base with many adapters by OpenAI's HTTP interface: `/v1/chat/completions`, `/v1/completions`.

    A request's `model` names the base, an adapter, or a composition. Requests for different models are decoded in one
    batch. `/health`, `/ready` and `/metrics` (Prometheus) are for monitoring. With an API key every path needs the
    key, also those, except on `--metrics-port`. SIGTERM stops the server after the running requests.
    """
    with errors():
        from flows.serving.options import ServeOptions
        from flows.serving.serve import serve as run
        from peftcore.serving import Limits

        project = None
        if watch_remote is not None and not watch:
            raise typer.BadParameter(
                "--watch-remote has no effect without --watch; give --watch too", param_hint="--watch-remote"
            )
        if watch_seconds is not None and not watch:
            raise typer.BadParameter(
                "--watch-seconds has no effect without --watch; leave it out", param_hint="--watch-seconds"
            )
        if redact is not None and record is None:
            raise typer.BadParameter("--redact has no effect without --record FOLDER", param_hint="--redact")
        if record_mb is not None and record is None:
            raise typer.BadParameter(
                "--record-mb has no effect without --record FOLDER; leave it out", param_hint="--record-mb"
            )
        if watch:
            from flows.params import load_params

            paths = Paths(find_root())
            project = (paths, load_params(paths.params))
        options = ServeOptions(
            base=base or _served_base(watch),
            limits=Limits(
                max_batch,
                max_queue,
                max_tokens,
                prefix_cache=prefix_cache * 2**20 or None,
                timeout=timeout,
                grace=grace,
            ),
            adapters=adapters,
            mixtures=composition or (),
            project=project,
            seconds=watch_seconds or WATCH_SECONDS,
            git_remote=watch_remote,
            host=host,
            port=port,
            metrics_port=metrics_port,
            name=name,
            max_loaded=max_loaded,
            dtype=dtype,
            adapter_dtype=adapter_dtype,
            load_from=load_from,
            chat_template=chat_template,
            tool_call_parser=tool_call_parser,
            keys=api_key or (),
            record=record,
            record_bytes=int((record_mb or RECORD_MB) * 1e6),
            redact=redact,
        )
        run(options)


def _served_base(watch: bool) -> Path:
    """Return the pipeline's base; with --watch the base as fetched, whose calibration each version's record names."""
    paths = Paths(find_root())
    return fetched_base(paths) if watch else pipeline_base(paths)
