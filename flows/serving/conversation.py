"""`peftcore chat`: a conversation in the terminal with a base, its adapters, or two of them side by side."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

from flows.errors import ChatError, PipelineError
from peftcore.errors import PeftError

if TYPE_CHECKING:
    from peftcore.routing import AdapterStore

BASE = "base"
HELP = """\
/model NAME [NAME]   talk to another model, or to two side by side
/models              list the models
/system TEXT         start again with a system prompt; without TEXT: with none
/reset               start again
/exit                end (also Ctrl-D); Ctrl-C stops an answer"""

Write = Callable[[str], object]


class Spoken(NamedTuple):
    """An answer: its text, the number of its tokens, and the seconds that it took."""

    text: str
    tokens: int
    seconds: float


class Conversation:
    """Turns of a user with one or several models of one base; each model sees its own answers.

    Args:
        model: The base, in which `store` loads the adapters.
        tokenizer: Its tokenizer, with a chat template.
        store: The adapters by name.
        system: System prompt; None for none.
        max_tokens: Longest answer (tokens).
        temperature: 0 takes the most likely token each time; otherwise answers are sampled.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        store: "AdapterStore",
        system: str | None = None,
        max_tokens: int = 256,
        temperature: float = 0.0,
    ):
        self._model, self._tokenizer, self._store = model, tokenizer, store
        self._max_tokens, self._temperature = max_tokens, temperature
        self._turns: dict[str, list[dict[str, str]]] = {}
        """{model: the turns without the system prompt}"""
        self._system = system

    def reset(self) -> None:
        """Forget all turns but the system prompt."""
        self._turns = {}

    def begin(self, system: str | None) -> None:
        """Forget all turns, and take another system prompt; None for none."""
        self._system, self._turns = system, {}

    def say(self, text: str, name: str, write: Write) -> Spoken:
        """Say something to a model, and write its answer as it comes.

        Ctrl-C stops the answer; what there is of it stays in the conversation.

        Args:
            text: The user's turn.
            name: An adapter of the store, or "base".
            write: Called with each piece of the answer.

        Raises:
            ChatError: The conversation does not fit into the model's context; nothing is said.
            PeftError: The adapter cannot be loaded.
        """
        from transformers import GenerationConfig

        from flows.base.folder import padding_id
        from flows.data.chat import end_of_turn, render

        turns = [*self._turns.get(name, []), {"role": "user", "content": text}]
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        prompt = render(self._tokenizer, [*system, *turns], generate=True)
        inputs = self._tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(self._model.device)
        length = inputs["input_ids"].shape[1]
        longest = getattr(self._model.config, "max_position_embeddings", None)
        if longest is not None and length + self._max_tokens > longest:
            raise ChatError(
                f"the conversation has {length} tokens, and {self._max_tokens} for the answer do not fit into the "
                f"{longest} of this model; /reset starts again"
            )
        sampling = {"do_sample": True, "temperature": self._temperature} if self._temperature else {"do_sample": False}
        config = GenerationConfig(
            max_new_tokens=self._max_tokens,
            eos_token_id=end_of_turn(self._tokenizer),
            pad_token_id=padding_id(self._tokenizer),
            **sampling,
        )
        pieces = _pieces(self._tokenizer, write)
        started = time.perf_counter()
        with nullcontext() if name == BASE else self._store.route(name):
            try:
                self._model.generate(**inputs, generation_config=config, streamer=pieces)
            except KeyboardInterrupt:
                pieces.end()
        spoken = Spoken(pieces.text.strip(), pieces.tokens, time.perf_counter() - started)
        self._turns[name] = [*turns, {"role": "assistant", "content": spoken.text}]
        return spoken


def _pieces(tokenizer: Any, write: Write) -> Any:
    """Return a streamer for `generate` that writes pieces of text, and keeps the text and the number of tokens."""
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        text, tokens = "", 0

        def put(self, value: Any) -> None:
            self.tokens += 0 if self.next_tokens_are_prompt else value.numel()
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text
            write(text)

    return Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)


def talk(
    conversation: Conversation,
    models: Sequence[str],
    add: Callable[[str], str],
    chosen: Sequence[str],
    read: Callable[[], str],
    write: Write,
) -> None:
    """Read turns and commands until the end of the input, and write answers.

    An error of a turn or a command is written, and the conversation goes on.

    Args:
        conversation: The conversation.
        models: Names that /models lists.
        add: Load a model by one of these names; returns its name in the conversation.
        chosen: Names of the models at the beginning.
        read: Returns the next line; raises EOFError at the end.
        write: Writes text.
    """
    talking = [add(name) for name in chosen]
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        command, _, rest = line.partition(" ")
        if command == "/exit":
            return
        try:
            if command == "/model":
                names = rest.split()
                if not 1 <= len(names) <= 2:
                    raise ChatError("/model takes one name, or two to compare; /models lists them")
                talking = [add(name) for name in names]
                write(f"talking to {' and '.join(talking)}\n")
            elif command.startswith("/"):
                _run_command(command, rest.strip(), conversation, models, write)
            elif line:
                _say(line, talking, conversation, write)
        except (PeftError, PipelineError) as error:
            write(f"error: {error}\n")


def _run_command(command: str, rest: str, conversation: Conversation, models: Sequence[str], write: Write) -> None:
    """Run a command other than /model and /exit. Raises ChatError if there is no such command."""
    if command == "/models":
        write("".join(f"{name}\n" for name in models))
    elif command == "/system":
        conversation.begin(rest or None)
        write("a new conversation\n")
    elif command == "/reset":
        conversation.reset()
        write("a new conversation\n")
    elif command == "/help":
        write(f"{HELP}\n")
    else:
        raise ChatError(f"there is no {command}; /help lists the commands")


def _say(line: str, talking: Sequence[str], conversation: Conversation, write: Write) -> None:
    """Write the answer of each model, with its tokens and seconds."""
    for name in talking:
        if len(talking) > 1:
            write(f"--- {name}\n")
        spoken = conversation.say(line, name, write)
        write(f"\n[{spoken.tokens} tokens, {spoken.seconds:.1f} s]\n")
