"""The command `peftcore chat`."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from flows.commands.common import BaseFolder, errors, project


def chat(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="`base`, a stage or a version; default: the promoted version."),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="An adapter's folder, in place of the project's versions."),
    ] = None,
    base: BaseFolder = None,
    system: Annotated[str | None, typer.Option(help="System prompt; default: data.system_prompt.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer (tokens).")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, help="0: the most likely token each time; above: answers are sampled.")
    ] = 0.0,
) -> None:
    """Talk to the promoted version, another version, or the base, in the terminal; answers are written as they come.

    Two models answer side by side. `/model NAME` switches, `/help` lists the commands, Ctrl-C stops an answer. Lines
    can also be piped in.
    """
    with errors():
        from flows.serving.chat import adapter_models, project_models
        from flows.serving.conversation import BASE, Conversation, talk

        if len(models or ()) > 2:
            raise typer.BadParameter("one or two models can answer side by side", param_hint="MODEL")
        if adapter is not None and base is None:
            raise typer.BadParameter("give --base too, the folder of the adapter's base", param_hint="--adapter")
        with nullcontext((None, None)) if adapter is not None else project() as (params, paths):
            if params is None or paths is None:
                assert adapter is not None and base is not None
                opened, default = adapter_models(adapter, base), adapter.resolve().name
            else:
                opened, default = project_models(paths, params, base or paths.base), params.gate.stage
                system = params.data.system_prompt if system is None else system
            with opened as (model, tokenizer, store, names, add):
                chosen = models or [default if default in names else BASE]
                asks = sys.stdin.isatty()
                if asks:
                    print(f"{' and '.join(chosen)}; /help lists the commands", file=sys.stderr)
                conversation = Conversation(model, tokenizer, store, system or None, max_tokens, temperature)
                talk(conversation, names, add, chosen, lambda: input("> " if asks else ""), _write)


def _write(text: str) -> None:
    print(text, end="", flush=True)
