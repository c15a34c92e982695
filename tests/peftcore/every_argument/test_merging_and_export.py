"""Arguments of functions that merge, convert and export adapters."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from argument_checks import checks
from argument_nets import Plain, X, adalora, lora, net, same, tensors_of, trained
from torch import Tensor

import peftcore
from peftcore import (
    CheckpointError,
    ConfigError,
    MergeError,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from peftcore.errors import ExportError, GgufError, PeftError
from peftcore.merging import Recipe

# -- merging -----------------------------------------------------------------------------------------------------------

MERGERS: dict[str, Callable[..., Any]] = {
    "model": lambda model, **options: model.merge_adapter(**options),
    "view": lambda model, **options: model.base_model.merge_adapter(**options),
    "unloading": lambda model, **options: model.merge_and_unload(**options),
    "view's unloading": lambda model, **options: model.base_model.merge_and_unload(**options),
}


@checks("PeftModel.merge_adapter", "adapter_names safe_merge")
@checks("TunerModel.merge_adapter", "adapter_names safe_merge")
@checks("PeftModel.merge_and_unload", "adapter_names safe_merge")
@checks("TunerModel.merge_and_unload", "adapter_names safe_merge")
@pytest.mark.parametrize("merge", MERGERS.values(), ids=list(MERGERS))
def test_merging(merge: Callable[..., Any]) -> None:
    model = net("a", "b")
    with torch.no_grad():
        expected = model(X, adapter_names="b")
        merge(model, adapter_names=["b"])
        if isinstance(model, PeftModel):
            model = model.merge_and_unload(adapter_names=["b"])
        torch.testing.assert_close(model(X), expected)
        broken = net("a")
        broken[0].adapters["a"].lora_A_weight.fill_(float("nan"))
        with pytest.raises(MergeError, match="NaN or Inf"):
            merge(broken, safe_merge=True)
        merge(broken, safe_merge=False)
        assert broken(X).isnan().any()


@checks("PeftModel.merge_and_unload", "progressbar")
@checks("TunerModel.merge_and_unload", "progressbar")
def test_progress_of_a_merge(capfd: pytest.CaptureFixture[str]) -> None:
    for model_of in (net, lambda: net().base_model, lambda: peftcore.LoraModel(Plain(), lora())):
        model_of().merge_and_unload(progressbar=False)
        assert not capfd.readouterr().err
        model_of().merge_and_unload(progressbar=True)
        assert "merge" in capfd.readouterr().err


@checks("PeftModel.merged", "adapter_names safe_merge")
def test_merging_for_a_block() -> None:
    model = net("a", "b")
    model[0].adapters["b"].lora_A_weight.data.fill_(float("nan"))
    with model.merged(["a"]):
        assert model[0].merged_names == ("a",)
    with model.merged(["b"]):
        assert model[0].merged_names == ("b",) and model(X).isnan().any()
    with pytest.raises(MergeError, match="NaN or Inf"), model.merged(["b"], safe_merge=True):
        pass
    assert not model[0].merged and not model(X).isnan().any()


@checks("PeftModel.add_merged", "adapter_name weights recipe rank")
def test_add_merged() -> None:
    model = net("a", "b")
    for name, options in {
        "m": {},
        "w": {"weights": {"a": 1.0, "b": 2.0}},
        "t": {"recipe": Recipe.ties(density=0.5), "rank": 2},
    }.items():
        model.add_merged(name, **{"weights": {"a": 1.0, "b": 1.0}, "recipe": Recipe.linear(), **options})
    with torch.no_grad():
        outputs = [model(X, adapter_names=name) for name in "mwt"]
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2])
    assert model.adapter_ranks("t") == {"0": 2} and model.adapter_ranks("m") == {"0": 4}


WEIGHTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adapters": ({}, {"adapters": ["a", "a2"]}),
    "weights": ({}, {"weights": [2.0, 1.0]}),
    "combination_type": ({}, {"combination_type": "linear"}),
    "svd_rank": ({}, {"svd_rank": 1}),
    "svd_clamp": ({}, {"svd_clamp": 0.6}),
    "density": ({"combination_type": "ties", "density": 0.9}, {"density": 0.3}),
    "majority_sign_method": (
        {"combination_type": "ties", "density": 0.9, "weights": [0.3, 2.0]},
        {"majority_sign_method": "frequency"},
    ),
}


@checks("PeftModel.add_weighted_adapter", " ".join(WEIGHTED))
@pytest.mark.parametrize("argument", WEIGHTED)
def test_add_weighted_adapter(argument: str) -> None:
    fixed, changed = WEIGHTED[argument]
    model = net("a", "b", "a2")
    first = {"adapters": ["a", "b"], "weights": [1.0, 1.0], "combination_type": "svd", **fixed}
    model.add_weighted_adapter(adapter_name="one", **first)
    model.add_weighted_adapter(adapter_name="two", **{**first, **changed})
    assert not same(tensors_of(model, "one"), tensors_of(model, "two"))


@checks("PeftModel.add_weighted_adapter", "adapter_name svd_full_matrices svd_driver")
def test_add_weighted_adapter_with_options_of_the_decomposition() -> None:
    """They choose how the same factors are computed, so other values are errors."""
    model = net("a", "b")
    for option in ({"svd_driver": "no-such-driver"}, {"svd_full_matrices": "yes"}):
        with pytest.raises(ConfigError, match=next(iter(option))):
            model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "m", **option)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="svd_driver has no effect"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "m", svd_driver="gesvd")
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "n", svd_full_matrices=False)
    assert {"m", "n"} < model.peft_config.keys()
    for option in ({"svd_rank": 2}, {"svd_clamp": 0.9}, {"density": 0.5}, {"majority_sign_method": "frequency"}):
        with pytest.warns(UserWarning, match=f"'linear': {next(iter(option))} has no effect"):
            model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "l", "linear", **option)  # type: ignore[arg-type]
        model.delete_adapter("l")


# -- conversion and export ---------------------------------------------------------------------------------------------


@checks("convert_to_lora", "model adapter_name rank tolerance")
@checks("add_as_lora", "model adapter_name new_name rank tolerance is_trainable")
@checks("save_as_lora", "path model adapter_name rank tolerance")
@pytest.mark.filterwarnings("ignore:adapter 'default' is a plain LoRA")
def test_conversion_to_lora(tmp_path: Path) -> None:
    model = net("default")
    model.add_adapter("h", peftcore.LoHaConfig(r=2, target_modules=["0"], init_weights=False))
    add = peftcore.add_as_lora
    assert add(model, "default", "exact").ranks == {"0": 2}
    assert add(model, "h", "small", rank=1, is_trainable=True).ranks == {"0": 1}
    assert trained(model) >= {f"0.lora_{f}.small.weight" for f in "AB"} and not any(
        "exact" in n for n in trained(model)
    )
    loose, tight = (add(model, "h", f"t{t}", tolerance=t / 10).ranks["0"] for t in (8, 1))
    assert loose < tight
    for options, rank in (
        ({}, 2),
        ({"adapter_name": "h", "rank": 1}, 1),
        ({"adapter_name": "h", "tolerance": 0.8}, loose),
        ({"adapter_name": "h", "tolerance": 0.1}, tight),
    ):
        _, tensors = peftcore.convert_to_lora(model, **options)
        assert {min(tensor.shape) for tensor in tensors.values()} == {rank}
    for number, options in enumerate(({}, {"adapter_name": "h", "rank": 1}, {"adapter_name": "h", "tolerance": 0.1})):
        ranks = peftcore.save_as_lora(tmp_path / str(number), model, **options).ranks
        assert ranks == {"0": (2, 1, tight)[number]}
        assert PeftConfig.from_pretrained(tmp_path / str(number)).peft_type == "LORA"


CONVERSIONS: dict[str, Callable[..., Any]] = {
    "convert_to_lora": lambda _path, model, **options: peftcore.convert_to_lora(model, **options),
    "save_as_lora": peftcore.save_as_lora,
}


@checks("convert_to_lora", "progressbar compile_kwargs")
@checks("save_as_lora", "progressbar compile_kwargs")
@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=list(CONVERSIONS))
@pytest.mark.filterwarnings("ignore:adapter 'default' is a plain LoRA")
def test_how_a_conversion_runs(convert: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = net()
    convert(tmp_path / "a", model)
    assert not capfd.readouterr().err
    convert(tmp_path / "b", model, progressbar=True)
    assert "Converting to LoRA" in capfd.readouterr().err
    compiled: list[Any] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    convert(tmp_path / "c", model, compile_kwargs={"backend": backend})
    assert compiled


@checks("convert_directory_to_lora", "source directory")
def test_conversion_of_a_directory(tmp_path: Path) -> None:
    adalora().save_pretrained(tmp_path / "ada")
    peftcore.convert_directory_to_lora(tmp_path / "ada", tmp_path / "out")
    assert PeftConfig.from_pretrained(tmp_path / "out").peft_type == "LORA"


@checks("convert_adapters_directory", "source directory model")
def test_conversion_of_a_directory_of_adapters(tmp_path: Path) -> None:
    from adapters_folders import houlsby_folder
    from prompt_models import build

    houlsby_folder(tmp_path / "houlsby", build("llama"))
    peftcore.convert_adapters_directory(tmp_path / "houlsby", tmp_path / "out", build("llama"))
    assert PeftConfig.from_pretrained(tmp_path / "out").peft_type == "BOTTLENECK"
    with pytest.raises(CheckpointError, match="belongs to no block of this GPT2LMHeadModel"):
        peftcore.convert_adapters_directory(tmp_path / "houlsby", tmp_path / "out", build("gpt2"))


@checks("export_vllm", "model adapter_name folder")
@checks("check_vllm", "folder max_lora_rank")
def test_export_to_vllm(tmp_path: Path) -> None:
    from vllm_models import adapted

    model = adapted()
    model.add_adapter("b", lora("q_proj", r=20))
    assert peftcore.export_vllm(model, "default", tmp_path / "a") == 8
    rank = peftcore.export_vllm(model, "b", tmp_path / "b")
    assert rank == 32 and peftcore.check_vllm(tmp_path / "b", max_lora_rank=32) == []
    assert peftcore.check_vllm(tmp_path / "b") and not peftcore.check_vllm(tmp_path / "a")


@checks("load_gguf_base", "path dtype model_class config device")
def test_load_a_gguf_base(tmp_path: Path) -> None:
    from gguf_models import tiny, write_gguf
    from transformers import AutoModelForSequenceClassification

    from peftcore.bases import GgufLinear

    files = [write_gguf(tiny("llama", **sizes), tmp_path / f"{len(sizes)}.gguf") for sizes in ({}, {"head_dim": 4})]
    one, other = (peftcore.load_gguf_base(file) for file in files)
    assert one.num_parameters() > other.num_parameters() and one.dtype == torch.float32
    assert not [module for module in one.modules() if isinstance(module, GgufLinear)]
    assert peftcore.load_gguf_base(files[0], torch.bfloat16).dtype == torch.bfloat16
    one.config.num_labels, one.config.pad_token_id = 3, 0
    options = {"model_class": AutoModelForSequenceClassification, "config": one.config}
    assert peftcore.load_gguf_base(files[0], **options).score.weight.shape == (3, 32)
    assert peftcore.load_gguf_base(files[0], device="meta").device.type == "meta"


@checks("save_gguf_base", "model source path")
def test_save_a_gguf_base(tmp_path: Path) -> None:
    from gguf_models import tiny, write_gguf

    from peftcore.bases import base_weight

    source = write_gguf(tiny("llama", intermediate_size=64), tmp_path / "base.gguf", kind="Q8_0")
    model: Any = peftcore.load_gguf_base(source)
    peftcore.save_gguf_base(model, source, tmp_path / "same.gguf")
    assert (tmp_path / "same.gguf").read_bytes() == source.read_bytes()
    layer: Any = base_weight(model.model.layers[0].mlp.up_proj)
    layer.write_codes(torch.full((64, 32), 200))
    peftcore.save_gguf_base(model, source, tmp_path / "other.gguf")
    assert (tmp_path / "other.gguf").read_bytes() != source.read_bytes()
    with pytest.raises(GgufError, match="there is no file"):
        peftcore.save_gguf_base(model, tmp_path / "absent.gguf", tmp_path / "other.gguf")


@checks("export_gguf_lora", "source adapter_name file base dtype")
@checks("export_gguf_merged", "base source file adapter_name dtype")
def test_export_to_gguf(tmp_path: Path) -> None:
    from gguf_models import adapted, tiny, write_gguf

    base, model = write_gguf(tiny("llama"), tmp_path / "base.gguf"), adapted("llama")
    model.add_adapter("b", lora("q_proj", r=1))
    sizes = {}
    for number, (name, dtype) in enumerate((("default", "float32"), ("b", "float32"), ("default", "float16"))):
        file = peftcore.export_gguf_lora(model, name, tmp_path / f"{number}.gguf", dtype=dtype)
        sizes[number] = file.stat().st_size
    assert sizes[1] < sizes[0] > sizes[2]
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises((ExportError, ConfigError), match="base"):
        peftcore.export_gguf_lora(tmp_path / "adapter", "default", tmp_path / "x.gguf")
    tiny("llama").save_pretrained(tmp_path / "model")
    assert peftcore.export_gguf_lora(
        tmp_path / "adapter", "default", tmp_path / "x.gguf", base=tmp_path / "model"
    ).is_file()
    merged = {
        (name, dtype): peftcore.export_gguf_merged(
            base, model, tmp_path / f"{name}{dtype}.gguf", adapter_name=name, dtype=dtype
        ).read_bytes()
        for name, dtype in (("default", "float32"), ("b", "float32"), ("default", "float16"))
    }
    assert len(set(merged.values())) == 3
    with pytest.raises((ExportError, OSError), match=r"none\.gguf"):
        peftcore.export_gguf_merged(tmp_path / "none.gguf", model, tmp_path / "y.gguf")


@checks("merge_streaming", "base_folder adapter_directory out_folder max_shard_bytes dtype storage double_quant")
@checks("merge_streaming", "progressbar")
def test_merge_streaming(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file
    from streamed_models import saved as base_model
    from streamed_models import trained as adapter

    base = base_model(tmp_path / "base")
    one, two = (adapter(base, lora("q_proj", r=r), tmp_path / f"adapter{r}") for r in (2, 3))

    def merged(name: str, directory: Path = one, source: Path = base, **options: Any) -> dict[str, Tensor]:
        folder = peftcore.merge_streaming(source, directory, tmp_path / name, **options)
        assert folder == tmp_path / name
        files = sorted(folder.glob("*.safetensors"))
        return {"files": torch.tensor(len(files)), **{k: t for file in files for k, t in load_file(file).items()}}

    capfd.readouterr()
    plain = merged("plain")
    assert not capfd.readouterr().err
    assert not same(merged("other adapter", two), plain)
    assert merged("shards", max_shard_bytes=10_000)["files"] > 1
    assert {t.dtype for key, t in merged("wide", dtype="float32").items() if key != "files"} == {torch.float32}
    assert same(merged("bar", progressbar=True), plain) and capfd.readouterr().err
    with pytest.raises((ExportError, ConfigError), match="storage"):
        merged("stored", storage="3 bit")
    with pytest.raises((ExportError, ConfigError), match="double_quant"):
        merged("doubled", double_quant=True)
    shutil.copytree(base, tmp_path / "empty")
    for file in (tmp_path / "empty").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(PeftError):
        merged("none", source=tmp_path / "empty")


@checks("_BaseAutoPeftModel.from_pretrained", "pretrained_model_name_or_path adapter_name is_trainable config revision")
@checks("_BaseAutoPeftModel.from_pretrained", "import_allowlist kwargs")
def test_auto_classes(tmp_path: Path) -> None:
    from routed_models import llama

    llama(torch.float32).save_pretrained(tmp_path / "base")
    model = get_peft_model(llama(torch.float32), lora("q_proj", base_model_name_or_path=str(tmp_path / "base")))
    model.peft_config["default"].task_type = "CAUSAL_LM"
    model.save_pretrained(tmp_path / "adapter")
    load = peftcore.AutoPeftModelForCausalLM.from_pretrained
    config = dataclasses.replace(PeftConfig.from_pretrained(tmp_path / "adapter"), lora_alpha=99)
    loaded = load(tmp_path / "adapter", "b", is_trainable=True, config=config, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and trained(loaded) and loaded.peft_config["b"].lora_alpha == 99
    with pytest.warns(UserWarning, match="revision='v7' has no effect on the local directory"):
        load(tmp_path / "adapter", revision="v7")
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    values |= {"task_type": None, "auto_mapping": {"parent_library": "json", "base_model_class": "JSONDecoder"}}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="asks to import 'json'"):
        peftcore.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="json has no class 'JSONDecoder' with from_pretrained"):
        peftcore.AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["json"])
