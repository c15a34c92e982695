"""A tiny model with adapters of several methods, served, and what `generate` says of each alone."""

import copy
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from peftcore import LoraConfig, PeftModel, get_peft_model
from peftcore.composition import Weighted
from peftcore.methods.ia3 import IA3Config
from peftcore.routing import AdapterStore
from peftcore.serving import Limits, Service, make_service
from peftcore.serving.generation import Chunk, Generation
from peftcore.serving.sampling import Sampling
from peftcore.serving.server import Server

LORA: dict[str, Any] = {"init_lora_weights": False, "lora_alpha": 8, "target_modules": "all-linear"}
CONFIGS: dict[str, Any] = {
    "sql": LoraConfig(r=4, **LORA),
    "chat": LoraConfig(r=2, **LORA),
    "dora": LoraConfig(r=2, use_dora=True, **LORA),
    "ia3": IA3Config(init_ia3_weights=False),
}
MIX = {"sql": 0.7, "chat": 0.3}


@dataclass
class World:
    """The base model, its tokenizer, and adapters on disk by name."""

    model: Any
    tokenizer: Any
    folder: Path
    alone: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, config: Any, seed: int, spoil: Callable[[Any], None] | None = None) -> Path:
        """Write one more adapter; spoil: changes its model before that. Gives its directory."""
        torch.manual_seed(seed)
        made = get_peft_model(copy.deepcopy(self.model), config)
        if spoil is not None:
            with torch.no_grad():
                spoil(made)
        made.save_pretrained(self.folder / name)
        return self.folder / name

    def expected(self, name: str, prompt: list[int], tokens: int) -> str:
        """The text of `generate` for one prompt with one adapter (or "base", or "mix") and nothing else."""
        if name not in self.alone:
            model = copy.deepcopy(self.model)
            for one in MIX if name == "mix" else [] if name == "base" else [name]:
                model = PeftModel.from_pretrained(model, self.folder / one, one)
            self.alone[name] = model.eval()
        model = self.alone[name]
        route = {"adapter_names": Weighted(MIX)} if name == "mix" else {}
        given = torch.tensor([prompt])
        found = model.generate(given, do_sample=False, max_new_tokens=tokens, pad_token_id=0, **route)
        return self.tokenizer.decode(found[0, len(prompt) :], skip_special_tokens=True)


@pytest.fixture
def sentencepiece() -> PreTrainedTokenizerBase:
    """A tokenizer like Llama 2's: a word's token has the space before it, and decoding drops a text's first space."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "the", "▁cat", "s"]
    backend = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.fixture
def world(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> World:
    """Adapters sql, chat, dora and ia3."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.4,  # so that answers vary
        eos_token_id=2,
        pad_token_id=0,
    )
    made = World(LlamaForCausalLM(config).double().eval(), tokenizer, tmp_path / "adapters")
    for seed, (name, one) in enumerate(CONFIGS.items()):
        made.add(name, one, seed)
    return made


@dataclass
class Served:
    """A service whose engine runs; `url` where a server listens too."""

    world: World
    service: Service
    url: str = ""
    server: Server | None = None
    clients: list[OpenAI] = field(default_factory=list)

    def client(self, **options: Any) -> OpenAI:
        """OpenAI's own client, which tries nothing twice."""
        made = OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "k", "max_retries": 0, "timeout": 60, **options})
        self.clients.append(made)
        return made

    def begin(self, model: str, prompt: list[int], tokens: int, matcher: Any = None, **sampling: Any) -> "Asked":
        """Submit a request to the engine, without HTTP."""
        asked = Asked()
        given = Sampling(tokens, **{"temperature": 0.0, **sampling})
        service = self.service
        asked.generation = Generation(
            model, prompt, given, service.tokenizer, service.eos_tokens, asked.events.put, matcher
        )
        service.engine.submit(asked.generation)
        return asked

    def wait(self, condition: Callable[[], Any], seconds: float = 20.0) -> None:
        """Until something holds."""
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, "it did not come about"
            time.sleep(0.005)

    def slow_down(self, seconds: float) -> None:
        """Delay each forward of the engine, and let no completion end by itself."""
        forward: Any = self.service.engine._forward
        original = forward._logits

        def slow(*args: Any) -> Any:
            time.sleep(seconds)
            logits = original(*args)
            logits[:, 2] = -1e9
            return logits

        forward._logits = slow

    def metric(self, name: str, **labels: str) -> float:
        """One of the counts."""
        return self.service.metrics._registry.get_sample_value(name, labels) or 0.0


class Asked:
    """A request that runs."""

    def __init__(self) -> None:
        self.events: queue.Queue[Any] = queue.Queue()
        self.generation: Any = None

    def first(self) -> Any:
        """The next event."""
        return self.events.get(timeout=30)

    def result(self) -> Any:
        """(text, finish, tokens), or the error."""
        text = ""
        while True:
            event = self.first()
            if not isinstance(event, Chunk):
                return event
            text += event.text
            if event.finish:
                return text, event.finish, event.tokens


@pytest.fixture
def serving(world: World) -> Iterator[Callable[..., Served]]:
    """Make services: `serving(http=True, limits=Limits(...), max_loaded=4, keys=[...])`."""
    made: list[tuple[Served, threading.Thread | None]] = []

    def serve(
        http: bool = False,
        max_loaded: int = 8,
        limits: Limits | None = None,
        keys: Any = (),
        metrics_port: int | None = None,
        **options: Any,
    ) -> Served:
        model = copy.deepcopy(world.model)
        store = AdapterStore(model, max_loaded)
        store.register_directory(world.folder)
        service = make_service(model, world.tokenizer, store, "base", {"mix": Weighted(MIX)}, limits, keys, **options)
        if not http:
            service.engine.start()
            made.append((Served(world, service), None))
            return made[-1][0]
        server = Server(service, "127.0.0.1", 0, metrics_port)
        thread = threading.Thread(target=server.run)
        thread.start()
        served = Served(world, service, server=server)
        made.append((served, thread))
        served.wait(lambda: server.started)
        served.url = server.address
        return served

    yield serve
    for served, thread in made:
        for client in served.clients:
            client.close()
        if served.server is not None and thread is not None:
            served.server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
        served.service.engine.stop()


@pytest.fixture
def served(serving: Callable[..., Served]) -> Served:
    """Return a service that listens on HTTP."""
    return serving(http=True)
