"""How many of HF PEFT's own tests pass with peftcore, of those that pass with HF PEFT in the same environment.

    git clone https://github.com/huggingface/peft /tmp/peft      # at the tag of the installed peft
    python -m benchmarks.hf_peft_tests /tmp/peft                 # results/hf_peft_tests.md and .json
    python -m benchmarks.hf_peft_tests /tmp/peft --files test_mixed test_config --jobs 2
    python -m benchmarks.hf_peft_tests /tmp/peft --sample 10     # one test in ten, to find causes
    python -m benchmarks.hf_peft_tests /tmp/peft --draw          # the table from the results that are there

Each file runs in two processes: with the installed HF PEFT, and with peftcore through `peftcore.as_peft`. Every test's
outcome is kept in --cells, so a run that was cut off goes on. The tests stay where they are: nothing of their text
enters the results, which hold ids of tests and causes of failures. Nothing is downloaded: tiny models with random
weights stand in for those that the tests load (`benchmarks.hf_peft_models`).
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.hf_peft_models import missing
from benchmarks.hf_peft_tests_side import read
from benchmarks.machine import cpu_model

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
FIRST = (
    "test_low_level_api",
    "test_mixed",
    "test_trainable_tokens",
    "test_target_parameters",
    "test_tuners_utils",
    "test_config",
    "test_lora_variants",
    "test_lora_conversion",
    "test_initialization",
    "test_custom_models",
)
"""Files that run first: those of which 95 % are to pass."""
LIBRARIES = ("peft", "peftcore")
BEGIN, END = "<!-- tests -->", "<!-- /tests -->"
INTERNAL = "a private name of HF PEFT, or a class or function that only its own layers and tests use"
NAMES = "names of modules and parameters, and keys of `state_dict()`, lack `base_model.model.` here"
WORDS = "an error or a warning has other words, which the test compares by itself"
REASONS = (
    (
        r"has no attribute '(deft_R|_cached_merge_factor|exp_avg_ipt_A|update_importance|frod_V|shira_indices|"
        r"_sparse_activation_mm|internal_xlora_classifier|lora_ga_config)'|test_masking_reduces_active_params",
        "what a method computes with besides its parameters is no attribute of a layer or of the model",
    ),
    (
        r"test_get_peft_model_repeated_invocation",
        "a PeftModel is the model itself, so a second `get_peft_model` does not wrap it again",
    ),
    (r"test_lora_plus_embedding_lr|test_dora_save_and_load_remapping", NAMES),
    (
        r"is ParameterDict\(",
        "the dictionaries of two layers with one tied weight are two objects, with the same parameters",
    ),
    (
        r"test_lora_plus_model_without_peft_wrapper",
        "an optimiser of LoRA's factors is refused for a model without a LoRA",
    ),
    (
        r"test_lorafa_(init|respects|scaling|weight_decay)",
        "LoRA-FA is PyTorch's AdamW with another gradient, and decays weights before the step, as AdamW's paper does",
    ),
    (
        r"'skip_init_on_device' object is not callable|'_collect_lora_pairs' object is not iterable|"
        r"must be Tensor, not _reshape_to_grouped_subtokens|<__main__\._\w+ object at 0x",  # stand-ins of private names
        INTERNAL,
    ),
    (r"warns_about_hooks|create_attention_mask|has no attribute 'forward'|_get_module_names_tied", INTERNAL),
    (r"test_bdlora_merge_delta|test_dora_caching", INTERNAL),
    (
        r"same_prng|different_prng",
        "each VeRA or FRoD adapter has projections of its own, so a second one may have other options",
    ),
    (r"'SharedTensors' object does not support item", "tensors that layers share are changed in place, not assigned"),
    (
        r"test_resume_training_model_with_topk_weights",
        "VB-LoRA's refusal to train on comes when its parameters would train, not in training mode",
    ),
    (r"test_model_initialization_wrong_task_type", "`CPTConfig` may leave `task_type` out"),
    (r"disable_input_dtype_casting", "inputs are never cast to an adapter's dtype, so no cast can fail"),
    (r"TestScalingAdapters.*scaling: ", "`layer.scaling` is a view, which shows the present values"),
    (r"empty_cache", "the device's cache is emptied by PyTorch's function for all accelerators"),
    (r"modules_to_save_targets_module_dict", "`modules_to_save` also takes containers of modules and of parameters"),
    (
        r"transient_attribute_access_non_existing",
        "a layer whose active adapter does not exist computes what the base computes",
    ),
    (r"test_targeting_trainable_tokens_raises", WORDS),
    (r"test_quantized_model_rejection", INTERNAL),
    (r"test_init_without_lora_ga_config_raises", "LoRA-GA without `lora_ga_config` takes its defaults"),
    (r"Arrow router layer not found", "Arrow's router is the adapter of its layer, without a module `lora_arrow`"),
    (r"test_training_updates_when_task_adapter_active", NAMES),
    (r"gradient_checkpointing\[.*(CPT|Prompt\w*|Gralora)Config.*AssertionError", NAMES),
    (r"test_(training\w*|lora_layer_replication)(\[(Lora|Gralora)Config.*)? \| AssertionError", NAMES),
    (r"test_generate_pos_args.*DID NOT RAISE", "`generate` of encoder-decoder models also takes positional arguments"),
    (r"test_set_requires_grad_prompt_learning_raises", "`set_requires_grad` also works for prompts"),
    (r"test_unload_adapter.*DID NOT RAISE AttributeError", "`unload` also removes prompts"),
    (
        r"test_lora_conversion.*'NoneType' is not iterable",
        "the user's configuration is not filled in with the model's default targets",
    ),
    (
        r"test_lora_conversion\[(OSF|Hira).*MSE too high",
        "`convert_to_lora` also converts OSF and HiRA, on this tiny model with a larger error than the test allows",
    ),
    (
        r"test_prefix_tuning_gemma4",
        "a prefix has the shapes of the layers, not of the configuration, and leaves none out",
    ),
    (
        r"by more than one of .*such modules cannot be merged",
        "merging adapters that both trained the same rows is refused; HF PEFT drops the trained rows",
    ),
    (
        r"test_prefix_tuning_offsets_position_ids_in_forward|prepare_inputs_for_generation_4d",
        "`base_model` is a view of the model, and `generate` needs no functions in between, so none can be replaced",
    ),
    (r"no attribute 'tinylora_v'", "the vectors that TinyLoRA's layers share are no attribute of the model"),
    (r"test_lora_mica_freezes_B", NAMES),
    (
        r"test_lora_variants.*cannot be made by itself",
        "layers are made by injection, and `register_variant` adds a variant of LoRA, not a table in each class",
    ),
    (
        r"test_num_beams_error|test_gradient_checkpointing_double_forward_raises",
        "aLoRA also works with beams, and with several forward passes before one backward under checkpointing",
    ),
    (
        r"test_peft_model_but_no_support|test_model_with_unsupported_layers|test_convert_model_with_trainable_bias",
        "`convert_to_lora` also converts convolutions, IA3 and trained biases",
    ),
    (
        r"test_lora_conversion.*targeted_modules_identical",
        "`state_dict()` has the names of modules here; `get_peft_model_state_dict` has HF PEFT's",
    ),
    (r"'peft_config' of .* has no deleter", "adapters keep their configurations, which cannot be deleted alone"),
    (
        r"test_target_parameters.*weighted_combination",
        "`add_weighted_adapter` also combines adapters of raw parameters",
    ),
    (r"test_target_parameters.*existing_parametrization", "a weight that is parametrised already is no raw parameter"),
    (r"test_mixed.*get_nb_trainable", "AdaLoRA's number of ranks is no parameter, so it is not counted"),
    (r"test_(model_)?quantization_backend", "the storage of a quantised weight is read from the layer, not assigned"),
    (r"NotInPeftcore|no attribute '_|_get_commit_hash|has no attribute 'get'|'MockBackend'", INTERNAL),
    (r"safe_serialization must be True", "pickles are never written (`safe_serialization=False` is refused)"),
    (r"test_adding_multiple_adapters_with_bias_raises|multiple_adapters.*bias", "several adapters may train biases"),
    (r"TestRequiresGrad|applies_find_target_modules|test_prefixes_select_correct_state_dict_keys", NAMES),
    (r"exiting_context_irregular_state", "`disable_adapter` leaves a layer that was disabled before it as it was"),
    (r"no attribute 'pvera_generator'", "the random generator of a PVeRA layer is no attribute of the layer"),
    (
        r"merge_and_unmerge\[PVeRA",
        "an adapter that is added to train is in training mode at once, also on a model in evaluation mode",
    ),
    (
        r"learnable_bias",
        "rounding: a trained bias b' is added as b' − b, which differs by 1e-7 of the output",
    ),
    (
        r"lora_embedding_A.*the layer has no such adapter",
        "a layer has the attributes of its own kind, and parameters are not added to it by hand",
    ),
    (
        r"test_model_with_injected_layers|test_prefixes_model_with_injected_layers_only",
        "`base_model.model` is the PeftModel itself",
    ),
    (r"test_mixed_model_raises", "models of several methods have a status, too"),
    (r"test_non_existing_model_card", "a model card says what is known, without a form to fill in"),
    (
        r"targeting_lora_to_embedding_layer_non_transformers",
        "`save_embedding_layers=True` saves the embeddings of any model that names them",
    ),
    (r"test_(training_custom_models|only_params_are_updated).*(trainable_tokens|Hybrid GraLoRA)", NAMES),
    (r"test_repr_lora", "a layer prints the shapes of an adapter's parameters, not modules inside of the layer"),
    (r"test_existing_model_card", "a model card that the user wrote is left as it is"),
    (r"targeting_lora_to_embedding_layer\[", "that adapted embeddings are saved whole needs no warning"),
    (r"test_safe_merge.*AdaLora", "rounding: merged weights in float32 differ by 1e-7 of the output"),
    (r"test_mha_gradients", "the output projection of nn.MultiheadAttention is adapted as a raw parameter of it"),
    (r"delete_adapter_multiple_adapters_with", "a layer whose last adapter is deleted becomes the plain layer again"),
    (r"test_mixed_adapter_batches_disabled", "`adapter_names` inside of `disable_adapter` is an error"),
    (
        r"test_mixed_adapter_batches_(training_mode|lora_with_dora)_raises",
        "mixed batches also work in training mode and with DoRA",
    ),
    (r"mixed_adapter_batches_(unsupported_layer|mha)_raises", "what cannot be mixed is refused when it is computed"),
    (
        r"train row|non_overlapping_trainable_token",
        "two adapters that train one row of an embedding exclude each other",
    ),
    (
        r"Tensor.__contains__|values expected sparse tensor",
        "the modules inside of a layer hold parameters under HF PEFT's names",
    ),
    (r"test_mixed.*AssertionError", "one class of layer serves all methods, so the number of layer types differs"),
    (
        r"(pissa|olora|corda)\w*_rslora_raises|test_lora_config_pissa_olora_warns",
        "a PiSSA, OLoRA or CorDA with rsLoRA and patterns is converted to a plain LoRA exactly; HF PEFT refuses it",
    ),
    (r"svd_rank", "a layer never gets a rank above its own size"),
    (
        r"bias_incompatible_arguments",
        "`lora_bias` works with each initialisation that HF PEFT refuses with it; the bias starts at zero",
    ),
    (r"groups_greater_than_one|test_road_with_conv2d", "HiRA and RoAD fit convolutions that HF PEFT refuses"),
    (
        r"TestVeraInitialization|test_frod_(mixing|add_second|multiple)",
        "each VeRA or FRoD adapter has projections of its own, so a second one may have other options",
    ),
    (r"different_target_parameters_raises", "adapters of one model may have different `target_parameters`"),
    (r"regex_with_layer_indexing", "`layers_to_transform` also restricts targets of a regular expression"),
    (r"invalid_total_step_raises", "AdaLoRA's `total_step` may be left to the trainer"),
    (
        r"test_lora_with_bias_argument\[(all|lora_only)|configs_with_bias_raises",
        "biases that train belong to the adapter",
    ),
    (r"bias_extra_params|missing_keys_warning|hotswap_missing_key", "parameters have the names of modules here"),
    (r"odd_rank_raises|bias_argument\[invalid", "refused when the configuration is made, not when the adapter is"),
    (
        r"is no parameter; did you mean",
        "a name without effect is an error, not a warning",
    ),
    (r"test_warning_name_", "the name of a base that the configuration states is kept"),
    (r"test_warning_naming_conflict", "names of adapters cannot collide with names of parameters"),
    (r"there is already an adapter named", "`load_adapter` with a name that is taken is an error"),
    (
        r"missing_keys_warning|hotswap_missing_key|missing_theta_d_key",
        "a saved adapter that lacks tensors is an error; `strict=False` warns",
    ),
    (r"does not match SHA256SUMS", "a weight file that was changed after it was saved is refused"),
    (r"scalings_are_tensors", "the modules inside of a layer have attributes of HF PEFT's layers as numbers"),
    (
        r"accepts no cache",
        "prefix tuning of a model without a cache is refused when the adapter is made, not in the first forward pass",
    ),
    (r"prompt_encoder_warning", INTERNAL),
    (r"in \W?<ExceptionInfo|token_indices_merging_sequentially|tying_warns_when_model_not_tied", WORDS),
    (r"cannot be made by itself", INTERNAL),
    (r"tying_tied_model_target_modules_all_linear", "`ensure_weight_tying` also ties a head that `all-linear` finds"),
    (r"[Tt]ied|[Tt]ying", "tied weights go by the shared parameter, and a tied weight is never changed by merging"),
)
"""Pairs of a pattern and the reason of the failures that it finds in "id of the test | type: message"."""


@dataclass(frozen=True)
class Run:
    """What is run and where its results are kept."""

    checkout: Path
    commit: str
    cells: Path
    sample: int
    """One test in so many runs."""
    limit: int
    """Seconds for one file."""
    select: str
    """pytest's -k."""

    def results(self, library: str, file: str) -> Path:
        return self.cells / library / f"{file}.jsonl"

    def settings(self, library: str) -> dict[str, Any]:
        code = version("peft") if library == "peft" else fingerprint()
        return {
            "tests": self.commit,
            "library": code,
            "torch": version("torch"),
            "transformers": version("transformers"),
        }


def main() -> None:
    options = parse()
    checkout = options.checkout.resolve()
    run = Run(checkout, commit_of(checkout), options.cells.resolve(), options.sample, options.limit, options.select)
    files = options.files or ordered(run.checkout)
    unknown = [file for file in files if not (run.checkout / "tests" / f"{file}.py").exists()]
    if unknown:
        sys.exit(f"--files: there is no {unknown[0]} in {run.checkout / 'tests'}; give names such as test_mixed")
    if not options.draw:
        measure(run, files, options)
    known = [file for file in ordered(run.checkout) if all(read(run.results(one, file)) for one in LIBRARIES)]
    report(run, known, options.folder)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.hf_peft_tests", description=str(__doc__).partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="folder of a clone of HF PEFT's repository")
    parser.add_argument("--files", nargs="+", metavar="NAME", help="such as test_mixed; all by default")
    parser.add_argument("--library", choices=LIBRARIES, help="run with this one only")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit", type=int, default=4 * 3600, help="seconds for one file with one library")
    parser.add_argument("--sample", type=int, default=1, help="run one test in so many, the same ones each time")
    parser.add_argument("--select", default="", metavar="EXPRESSION", help="pytest's -k")
    parser.add_argument("--keep", action="store_true", help="keep results of peftcore though its code has changed")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the table is written")
    kept = Path(tempfile.gettempdir()) / "peftcore-hf_peft_tests"
    parser.add_argument("--cells", type=Path, default=kept, help="where each test's outcome is kept")
    parser.add_argument("--draw", action="store_true", help="table from the outcomes that are there; run nothing")
    options = parser.parse_args()
    if not (options.checkout / "tests" / "testing_common.py").exists():
        parser.error(f"{options.checkout} is no checkout of HF PEFT: there is no tests/testing_common.py")
    if options.sample < 1 or options.jobs < 1:
        parser.error("--sample and --jobs must be at least 1")
    return options


def ordered(checkout: Path) -> list[str]:
    names = {path.stem for path in (checkout / "tests").glob("test_*.py")}
    return [name for name in FIRST if name in names] + sorted(names - set(FIRST))


def commit_of(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def fingerprint() -> str:
    """Return a checksum of peftcore's source."""
    digest = hashlib.sha256()
    for path in [*sorted((ROOT / "peftcore").rglob("*.py")), Path(__file__).with_name("hf_peft_tests_side.py")]:
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


# -- running ---------------------------------------------------------------------------------------------------------


def measure(run: Run, files: list[str], options: argparse.Namespace) -> None:
    """Run the files with both libraries."""
    if missing(hub := run.cells / "hub"):
        subprocess.run([sys.executable, "-m", "benchmarks.hf_peft_models", str(hub)], cwd=ROOT, check=True)
    units = [(library, file) for file in files for library in LIBRARIES if options.library in (None, library)]
    for library, file in units:
        prepare(run, library, file, keep=options.keep)
    with ThreadPoolExecutor(options.jobs) as pool, tqdm(total=len(units), unit="file", disable=None) as bar:
        running = {pool.submit(run_file, run, *unit): unit for unit in units}
        while running:
            time.sleep(1)
            for future in [future for future in running if future.done()]:
                library, file = running.pop(future)
                bar.update()
                bar.write(f"{file} with {library}: {future.result()}")
            bar.set_postfix_str(", ".join(filter(None, (progress(run, *unit) for unit in running.values()))))


def prepare(run: Run, library: str, file: str, keep: bool) -> None:
    """Begin a file of results, unless it has results of the same code."""
    path, settings = run.results(library, file), run.settings(library)
    lines = read(path)
    begun = lines[0].get("settings", {}) if lines else None
    if any("collected" in line for line in lines[1:]) and not any("id" in line for line in lines):
        begun = None  # the file could not be imported
    if begun == settings or (keep and library == "peftcore" and begun and begun["tests"] == run.commit):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")


def run_file(run: Run, library: str, file: str) -> str:
    """Run a file in a process, again after a crash; return how it ended."""
    path, end = run.results(library, file), time.monotonic() + run.limit
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    hub = run.cells / "hub"
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub), "HF_DATASETS_CACHE": str(hub / "datasets")}
    command = [sys.executable, "-m", "benchmarks.hf_peft_tests_side", library]
    command += [str(run.checkout / "tests" / f"{file}.py"), str(path), f"--sample={run.sample}"]
    command += [f"--select={run.select}"] if run.select else []
    log = path.with_suffix(".log")
    try:
        while (left := end - time.monotonic()) > 0:
            with log.open("w", encoding="utf-8") as output:
                try:
                    done = subprocess.run(
                        command, cwd=run.checkout, env=environment, stdout=output, stderr=output, timeout=left
                    )
                except subprocess.TimeoutExpired:
                    break
            if done.returncode == 0:
                return outcomes(path)
            crashed = (
                json.loads(running.read_text(encoding="utf-8"))["id"]
                if (running := path.with_suffix(".running")).exists()
                else None
            )
            if crashed is None or crashed in {line.get("id") for line in read(path)}:
                return f"ended with status {done.returncode}; see {log}"
            failure = {"type": "Crash", "message": f"the process ended with status {done.returncode}"}
            with path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"id": crashed, "outcome": "failed", "seconds": 0, **failure}) + "\n")
        return f"stopped after {run.limit} s; {outcomes(path)}"
    finally:
        path.with_suffix(".running").unlink(missing_ok=True)


def outcomes(path: Path) -> str:
    counts = Counter(line["outcome"] for line in read(path) if "id" in line)
    return ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items())) or "no test"


def progress(run: Run, library: str, file: str) -> str:
    path = run.results(library, file).with_suffix(".running")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):  # not begun, or being written
        return ""
    return f"{file} with {library} {state['finished']}/{state['of']}"


# -- table -----------------------------------------------------------------------------------------------------------


def cause(line: dict[str, Any] | None) -> str:
    """Return why a test fails, in words that hold nothing of the test's text."""
    if line is None:
        return "not collected"
    message = line.get("message", "")
    first = next((text for text in message.splitlines() if text.strip()), "")
    subject = f"{line['id']} | {line.get('type')}: {message}"
    for pattern, reason in REASONS:
        if re.search(pattern, subject, re.DOTALL):
            return reason
    if line["outcome"] == "skipped":
        return "skipped"
    if line.get("type") == "NotInPeftcore":
        return first.partition(" (")[0]
    if line.get("raised", "").startswith("peftcore/"):
        return f"{line['type']}: " + re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "…", first)[:90]
    name = re.split(r"::|\[", line["id"])[-2 if "[" in line["id"] else -1]
    return f"{line.get('type') or 'failure'} in {name}"


def _id(test: str) -> str:
    """Return a test's id without the number of its case in a list, which counts the methods of the library."""
    return re.sub(r"mandatory_kwargs\d+", "mandatory_kwargs", test)


def compare(run: Run, file: str) -> dict[str, Any]:
    """Return what the table and the JSON say of a file."""
    lines = {library: read(run.results(library, file)) for library in LIBRARIES}
    by_id = {one: {_id(line["id"]): line for line in lines[one] if "id" in line} for one in LIBRARIES}
    ours = by_id["peftcore"]
    collected = {one: max((line.get("collected", 0) for line in lines[one]), default=0) for one in LIBRARIES}
    unfinished = len(by_id["peftcore"]) < collected["peftcore"]  # a sample, or a run that was cut off
    passed = [test for test, line in by_id["peft"].items() if line["outcome"] == "passed"]
    passed = [test for test in passed if test in ours or not unfinished]
    failures = {test: cause(ours.get(test)) for test in passed if ours.get(test, {}).get("outcome") != "passed"}
    wording = [test for test in passed if test not in failures and ours[test].get("other_wording")]
    return {
        "file": file,
        "collected": collected["peft"],
        "collected_with_peftcore": collected["peftcore"],
        "run": len(by_id["peft"].keys() & ours.keys()) if unfinished else len(by_id["peft"]),
        "passed_with_peft": len(passed),
        "passed_with_both": len(passed) - len(failures),
        "other_wording": len(wording),
        "peftcore": lines["peftcore"][0]["settings"]["library"],
        "causes": dict(Counter(failures.values()).most_common()),
        "failures": failures,
    }


def report(run: Run, files: list[str], folder: Path) -> None:
    rows = [compare(run, file) for file in files]
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "tests": run.commit,
        "peft": version("peft"),
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m benchmarks.hf_peft_tests CHECKOUT",
        "rows": rows,
    }
    (folder / "hf_peft_tests.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    text = table(run, rows)
    (folder / "hf_peft_tests.md").write_text(text, encoding="utf-8")
    if folder == RESULTS:
        page = ROOT / "docs" / "peft-tests.md"
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        page.write_text(f"{before}{BEGIN}\n{text}{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(text)


def table(run: Run, rows: list[dict[str, Any]]) -> str:
    """Return the page: one row per file, then the causes."""
    lines = [
        f"HF PEFT's own tests (commit {run.commit[:12]} of its repository) with HF PEFT {version('peft')} and with "
        "peftcore through `peftcore.as_peft`, without GPU and network, with tiny stand-in models. Of the tests that "
        "pass with HF PEFT here, how many pass with peftcore. Tests that need the network, a GPU or a package that is "
        "not installed fail or are skipped with both, so they are not counted. A test passes also if an error or a "
        "warning of the same type has other words, also where the test compares them by itself; the number of these "
        "tests is in brackets. Where fewer tests were run than collected, they are a sample, chosen by a checksum of "
        "each test's id.",
        "",
        "| file | tests | run | passed with HF PEFT | of those with peftcore | % |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    rows = [row for row in rows if row["passed_with_peft"]]
    keys = ("collected", "run", "passed_with_peft", "passed_with_both", "other_wording")
    for row in [*rows, {"file": "all", **{key: sum(row[key] for row in rows) for key in keys}}]:
        passed, both = row["passed_with_peft"], row["passed_with_both"]
        cells = [row["file"], f"{row['collected']:,}", f"{row['run']:,}", f"{passed:,}"]
        cells += [f"{both:,} ({row['other_wording']:,})", f"{100 * both / max(1, passed):.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    versions = f"torch {version('torch')}, transformers {version('transformers')}"
    measured = f"Measured on {cpu_model()}, {time.strftime('%Y-%m-%d')}, {versions}."
    lines += ["", f"{measured} `python -m benchmarks.hf_peft_tests CHECKOUT`"]
    reasons: Counter[str] = Counter()
    places: dict[str, list[str]] = {}
    for row in rows:
        for reason, number in row["causes"].items():
            reasons[reason] += number
            places.setdefault(reason, []).append(f"{row['file'].removeprefix('test_')} {number}")
    lines += ["", "| tests that do not pass with peftcore | number | where |", "|---|---:|---|"]
    for reason, number in reasons.most_common():
        lines.append(f"| {reason.replace('|', '/')} | {number:,} | {', '.join(places[reason])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
