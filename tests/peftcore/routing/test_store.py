"""An adapter store: what is loaded, what makes room, what stays, under threads; what one bad adapter leaves whole."""

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore import IA3Config, LoraConfig, PeftModel, get_peft_model
from peftcore._util.fingerprint import unchanging_weights
from peftcore.composition import Stack
from peftcore.errors import AdapterNameError, AdapterStoreError, CheckpointError, ConfigError, RoutingError
from peftcore.files import MANIFEST
from peftcore.files.tensors import WEIGHTS_NAME
from peftcore.routing import AdapterStore
from peftcore.routing.entries import Entry

TOKENS = torch.arange(3, 31).view(4, 7)


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()


def write(folder: Path, name: str, config: Any = None, seed: int | None = None) -> Path:
    """A saved adapter with random weights."""
    config = config or LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    base = llama()  # which has a seed of its own
    torch.manual_seed(len(name) + sum(map(ord, name)) if seed is None else seed)
    model = get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder / name)
    return folder / name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b", "c", "d"):
        write(tmp_path, name)
    write(tmp_path, "r2", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    write(tmp_path, "ia3", IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    return tmp_path


@torch.no_grad()
def alone(folder: Path, name: str) -> Tensor:
    return PeftModel.from_pretrained(llama(), folder / name)(TOKENS).logits


def store_of(folder: Path, **limits: Any) -> tuple[Any, AdapterStore]:
    model = get_peft_model(llama(), LoraConfig(r=1, target_modules=["q_proj"]), "first").eval()
    store = AdapterStore(model, **limits)
    assert store.register_directory(folder) == sorted(path.name for path in folder.iterdir())
    return model, store


@torch.no_grad()
def through(model: Any, store: AdapterStore, given: Any) -> Tensor:
    with store.route(given):
        return model(TOKENS).logits


def test_every_adapter_is_itself_whatever_was_in_its_place_before(folder: Path) -> None:
    model, store = store_of(folder, max_loaded=2)
    for name in ("a", "b", "c", "ia3", "r2", "a", "d", "b", "ia3"):
        torch.testing.assert_close(through(model, store, name), alone(folder, name), atol=1e-5, rtol=0)
        assert len(model.peft_config) <= 3
    counts = store.statistics()
    assert (counts["hits"], counts["misses"], counts["evictions"], counts["loaded"]) == (0, 9, 7, 2)
    assert counts["registered"] == 6 and counts["hit_rate"] == 0 and counts["load_seconds_median"] > 0


def test_a_reused_place_is_noticed_where_weights_are_taken_to_stay_as_they_are(folder: Path) -> None:
    model, store = store_of(folder, max_loaded=1)
    with unchanging_weights():  # as the server's thread, while others load adapters
        for name in ("a", "b", "a"):
            torch.testing.assert_close(through(model, store, name), alone(folder, name), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone(folder, "a"), alone(folder, "b"), atol=1e-2)


def test_the_least_recently_used_makes_room(folder: Path) -> None:
    _model, store = store_of(folder, max_loaded=3)
    for name in ("a", "b", "c", "a"):
        store.acquire(name).release()
    assert store.loaded() == ["b", "c", "a"]
    store.acquire("d").release()
    assert store.loaded() == ["c", "a", "d"] and store.statistics()["hits"] == 1
    with store.pin("c"):
        for name in ("b", "d", "r2"):
            store.acquire(name).release()
        assert "c" in store.loaded()


def test_rows_of_a_batch_and_compositions_by_registered_names(folder: Path) -> None:
    model, store = store_of(folder, max_loaded=4)
    mixed = through(model, store, ["a", None, "ia3", {"b": 1.0}])
    for row, name in ((0, "a"), (2, "ia3"), (3, "b")):
        torch.testing.assert_close(mixed[row], alone(folder, name)[row], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        through(model, store, {"a": 0.5, "b": 0.5}),
        through(model, store, Stack({"b": 0.5}, {"a": 0.5})),
        atol=1e-5,
        rtol=0,
    )
    with pytest.raises(AdapterStoreError, match="no room for adapter"):
        through(model, store, ["a", "b", "c", {"d": 1.0, "ia3": 1.0}])
    assert store.statistics()["in_use"] == 0
    with pytest.raises(RoutingError):
        through(model, store, ["a", "b"])
    assert store.statistics()["in_use"] == 0


def test_bytes_are_a_budget(folder: Path) -> None:
    _, store = store_of(folder)
    store.acquire("a").release()
    size = store.statistics()["bytes"]
    assert size == sum(t.numel() * 4 for t in load_file(folder / "a" / WEIGHTS_NAME).values())
    _, store = store_of(folder, max_bytes=2 * size)
    for name in ("a", "b", "c"):
        store.acquire(name).release()
    assert store.loaded() == ["b", "c"] and store.statistics()["bytes"] == 2 * size
    store.acquire("r2").release()  # small, and yet one has to go
    assert store.loaded() == ["c", "r2"]
    _model, store = store_of(folder, max_bytes=size - 1)
    with pytest.raises(AdapterStoreError, match=f"adapter 'a' has {size:,} bytes of parameters, and the store's limit"):
        store.acquire("a")


def test_adapters_in_the_type_of_their_layers(folder: Path) -> None:
    """They take half of the bytes, also in the slot of another one, and answer as a model with such adapters."""
    model = llama().bfloat16()
    store = AdapterStore(model, max_loaded=1, autocast_adapter_dtype=False)
    store.register_directory(folder)
    for name in ("a", "b", "ia3"):
        with torch.no_grad(), store.route(name):
            y = model(TOKENS).logits
        size = sum(t.numel() * 2 for t in load_file(folder / name / WEIGHTS_NAME).values())
        assert store.statistics()["bytes"] == size
        alone = PeftModel.from_pretrained(llama().bfloat16(), folder / name, autocast_adapter_dtype=False)
        with torch.no_grad():
            assert torch.equal(y, alone.eval()(TOKENS).logits)
    smaller = AdapterStore(llama().bfloat16(), max_bytes=size, autocast_adapter_dtype=False)
    smaller.register_directory(folder)
    smaller.acquire("ia3").release()
    with pytest.raises(AdapterStoreError, match="bytes of parameters"):
        smaller.acquire("a")
    with pytest.raises(ConfigError, match="autocast_adapter_dtype must be True or False; got 'no'"):
        AdapterStore(model, autocast_adapter_dtype="no")  # type: ignore[arg-type]


def test_where_all_are_held_it_waits_or_says_so(folder: Path) -> None:
    _, store = store_of(folder, max_loaded=1)
    lease = store.acquire("a")
    with pytest.raises(AdapterStoreError, match="all 1 loaded adapters are in use"):
        store.acquire("b")
    threading.Timer(0.2, lease.release).start()
    with store.acquire("b", timeout=30):
        assert store.loaded() == ["b"]
    lease.release()  # a second time does nothing
    assert store.statistics()["in_use"] == 0


def test_a_request_without_room_reads_no_file_and_is_no_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, store = store_of(folder, max_loaded=1)
    lease = store.acquire("a")
    before = store.statistics()
    with monkeypatch.context() as patch:
        patch.setattr(Entry, "read", lambda *_: pytest.fail("it was read"))
        for _ in range(3):
            with pytest.raises(AdapterStoreError, match="no room for adapter 'b'"):
                store.acquire("b")
    after = store.statistics()
    assert (after["misses"], after["failures"]) == (before["misses"], before["failures"]) == (1, 0)
    lease.release()
    store.acquire("b").release()
    assert store.statistics()["misses"] == 2


def test_a_new_version_comes_while_the_old_one_is_in_use(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model, store = store_of(folder, max_loaded=3)
    newer = write(tmp_path_factory.mktemp("newer"), "a", seed=99)
    old = store.acquire("a")
    before = _routed(model, old.name)
    store.replace("a", newer)
    with store.acquire("a") as new:
        assert (old.version, new.version) == (1, 2) and old.name != new.name
        assert torch.equal(_routed(model, old.name), before)
        torch.testing.assert_close(_routed(model, new.name), alone(newer.parent, "a"), atol=1e-5, rtol=0)
    old.release()
    for name in ("b", "c"):
        store.acquire(name).release()
    assert store.loaded() == ["a", "b", "c"]  # the old version was the first to go
    store.remove("a")
    with pytest.raises(AdapterNameError, match="no adapter 'a' is registered; there are 5: b, c, d"):
        store.acquire("a")


def test_a_swap_loads_before_it_switches_and_a_refused_one_changes_nothing(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model, store = store_of(folder, max_loaded=2)
    newer = write(tmp_path_factory.mktemp("newer"), "a", seed=99)
    damaged = tmp_path_factory.mktemp("damaged") / "a"
    shutil.copytree(newer, damaged)
    (damaged / WEIGHTS_NAME).write_bytes(b"none")
    expected = through(model, store, "a")

    def refuse(loaded: str) -> None:
        assert loaded in model.peft_config
        raise ValueError("not this one")

    with pytest.raises(CheckpointError):
        store.swap("a", damaged)
    with pytest.raises(ValueError, match="not this one"):
        store.swap("a", newer, check=refuse)
    torch.testing.assert_close(through(model, store, "a"), expected, atol=1e-6, rtol=0)
    store.swap("a", newer)
    misses = store.statistics()["misses"]
    torch.testing.assert_close(through(model, store, "a"), alone(newer.parent, "a"), atol=1e-5, rtol=0)
    assert store.statistics()["misses"] == misses  # it is in the model before anybody asks for it
    with store.using("a", "b"), pytest.raises(AdapterStoreError, match="no room"):
        store.swap("a", folder / "a")
    store.swap("new", folder / "c", tags=["stage"])
    assert store.names("stage") == ["new"] and "new" in store.loaded()


@torch.no_grad()
def _routed(model: Any, name: str) -> Tensor:
    return model(TOKENS, adapter_names=name).logits


def test_one_bad_adapter_leaves_the_others_and_the_model_as_they_were(folder: Path) -> None:
    model, store = store_of(folder, max_loaded=2)
    expected = through(model, store, "a")
    tensors = load_file(folder / "b" / WEIGHTS_NAME)
    first = next(iter(tensors))
    save_file({**tensors, first: tensors[first] * float("nan")}, folder / "b" / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match=f"does not match {MANIFEST}"):
        store.acquire("b")
    (folder / "b" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="is not finite"):
        store.acquire("b")
    shutil.rmtree(folder / "c")
    with pytest.raises(CheckpointError):
        store.acquire("c")
    save_file({key: t[:1] for key, t in tensors.items()}, folder / "d" / WEIGHTS_NAME)
    (folder / "d" / MANIFEST).unlink()
    for _ in range(2):  # the second time into the place of an adapter of the same configuration
        with pytest.raises(CheckpointError, match="belongs to another base"):
            store.acquire("d")
        store.acquire("r2").release()
    assert store.statistics()["failures"] == 5
    torch.testing.assert_close(through(model, store, "a"), expected, atol=1e-6, rtol=0)


def test_sources_are_fetched_once_and_tags_are_kept(folder: Path) -> None:
    calls: list[int] = []

    def fetch() -> Path:
        calls.append(1)
        return folder / "a"

    _, store = store_of(folder, max_loaded=1)
    store.register("fetched", fetch, tags=["tenant-1", "sql"])
    assert not calls and store.names("sql") == ["fetched"] and store.names("other") == []
    for name in ("fetched", "b", "fetched"):
        store.acquire(name).release()
    assert len(calls) == 1
    with pytest.raises(AdapterNameError, match="'fetched' is registered already; replace it, or take another name"):
        store.register("fetched", folder)


def test_prefetching_and_closing(folder: Path) -> None:
    model, store = store_of(folder, max_loaded=4)
    for future in store.prefetch("a", "b"):
        future.result(30)
    assert store.loaded() == ["a", "b"]
    (unknown,) = store.prefetch("z")
    with pytest.raises(AdapterNameError):
        unknown.result(30)
    store.close()
    assert list(model.peft_config) == ["first"] and store.loaded() == []


def test_threads_share_one_store(folder: Path) -> None:
    """Adapters come and go under requests that run; every one of them computes with its own."""
    model, store = store_of(folder, max_loaded=3)
    names = ["a", "b", "c", "d"]
    expected = {name: alone(folder, name) for name in names}
    failures: list[str] = []

    def work(seed: int) -> None:
        for turn in range(12):
            name = names[(seed * 5 + turn * 3) % 4]
            try:
                with store.route(name, timeout=60):
                    with torch.no_grad():
                        found = model(TOKENS).logits
                    time.sleep(0.001)
                if not torch.allclose(found, expected[name], atol=1e-4):
                    failures.append(name)
            except Exception as error:
                failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    counts = store.statistics()
    assert counts["hits"] + counts["misses"] == 36 and counts["in_use"] == 0 and counts["loaded"] <= 3


def test_bad_limits_and_folders(tmp_path: Path) -> None:
    with pytest.raises(AdapterStoreError, match="must be at least 1"):
        AdapterStore(llama(), max_loaded=0)
    with pytest.raises(CheckpointError, match="holds no adapter directories"):
        AdapterStore(llama()).register_directory(tmp_path)


def test_versions_that_were_replaced_or_refused_make_room_for_the_next_one(folder: Path) -> None:
    model, store = store_of(folder, max_loaded=64)

    def refuse(loaded: str) -> None:
        raise ValueError("not this one")

    for number in range(4):
        store.swap("a", folder / "ab"[number % 2])
        with pytest.raises(ValueError, match="not this one"):
            store.swap("a", folder / "c", check=refuse)
    assert len(model.peft_config) <= 3  # the served one, the refused one, and one for a request that still runs
    torch.testing.assert_close(through(model, store, "a"), alone(folder, "b"), atol=1e-5, rtol=0)
