"""What is done with an adapter and its base outside of the pipeline: export, merge, serve."""

import json
from pathlib import Path
from typing import Annotated

import typer

from flows.commands.common import AdapterFolder, AsJson, BaseFolder, adapter_and_base, errors, one_document
from flows.commands.exporting import Format
from flows.paths import Paths
from flows.runtime import logs
from flows.runtime.project import find_root


def export(
    form: Annotated[Format, typer.Argument(metavar="FORMAT", help="`gguf-lora`, `gguf-merged` or `vllm`.")],
    out: Annotated[Path, typer.Argument(help="The file, or for vllm the folder, to write.")],
    adapter: AdapterFolder = None,
    base: BaseFolder = None,
    gguf: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="For gguf-merged: the base's own GGUF; left out: made of the base's folder.",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of matrices in a GGUF: float32, float16, or bfloat16.")] = "float16",
    rank: Annotated[int | None, typer.Option(min=1, help="Convert it to LoRA of this rank first.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="Convert it to LoRA first, within this relative error per layer.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write an adapter for llama.cpp (GGUF), or for vLLM and LoRAX; nothing is written of what they cannot take.

    Without options it is the adapter and the base of the pipeline in this folder.
    """
    with errors():
        from flows.commands.exporting import export as write

        with one_document(as_json):
            written = write(form, *adapter_and_base(adapter, base), out, gguf, dtype, rank, tolerance)
        print(json.dumps({"format": form, "path": str(out), "note": written}) if as_json else written)


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
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base, shard by shard, with one weight in memory at a time.

    Without options it is the adapter and the base of the pipeline in this folder. The pipeline's own merge stage
    also measures how faithful the merged model is.
    """
    with errors():
        from peftcore.export import merge_streaming

        folders = adapter_and_base(adapter, base)
        size = int(shard_gb * 1e9)
        bar = not logs.is_quiet()
        with one_document(as_json):
            written = merge_streaming(folders[1], folders[0], out, size, dtype, storage, double_quant, progressbar=bar)
        print(json.dumps({"path": str(written)}) if as_json else written)


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
        bool,
        typer.Option(
            "--watch",
            help="Serve this project's promoted version too, and each that follows it, on the base it was judged on.",
        ),
    ] = False,
    watch_seconds: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Between looks.")] = 5.0,
    watch_remote: Annotated[
        str | None,
        typer.Option(
            metavar="REMOTE",
            help="With --watch: a git remote whose tags are fetched at each look; without it, only tags that something "
            "else fetches are seen.",
        ),
    ] = None,
) -> None:
    """Serve a base with many adapters by OpenAI's HTTP interface: `/v1/chat/completions`, `/v1/completions`.

    A request's `model` names the base, an adapter, or a composition; requests for different ones are decoded in one
    batch. `/health`, `/ready` and `/metrics` (Prometheus) are for whoever watches it. SIGTERM ends it after what runs.
    """
    with errors():
        from flows.serving.options import ServeOptions
        from flows.serving.serve import serve as run
        from peftcore.serving import Limits

        project = None
        if watch_remote is not None and not watch:
            raise typer.BadParameter(
                "it says where --watch fetches from; give --watch too", param_hint="--watch-remote"
            )
        if watch:
            from flows.params import load_params

            paths = Paths(find_root())
            project = (paths, load_params(paths.params))
        options = ServeOptions(
            base=base or Paths(find_root()).base,
            limits=Limits(max_batch, max_queue, max_tokens, timeout=timeout, grace=grace),
            adapters=adapters,
            mixtures=composition or (),
            project=project,
            seconds=watch_seconds,
            git_remote=watch_remote,
            host=host,
            port=port,
            name=name,
            max_loaded=max_loaded,
            dtype=dtype,
            keys=api_key or (),
        )
        run(options)
