"""The model card of a version, in the Hugging Face hub's format: YAML front matter, then Markdown.

The card is written from the lineage record alone, so every version can have one. Text that comes from data (names of
slices, sources) is escaped. Of a local path only the last part is shown.
"""

import io
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from ruamel.yaml import YAML

from flows.paths import CORRECTED_STORAGE
from flows.registry.loss_names import loss_in_words

CARD = "registry/README.md"
"""Path of the card in a version's own commit."""
SLICES = 12
"""Largest number of slices shown, largest slices first."""

_TASKS = {
    "classification": "text-classification",
    "reward": "text-classification",
    "token_classification": "token-classification",
    "seq2seq": "text2text-generation",
    "embedding": "sentence-similarity",
    "reranker": "text-ranking",
}
_LOADERS = {
    "classification": "AutoModelForSequenceClassification",
    "reward": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "embedding": "AutoModel",
    "reranker": "AutoModelForSequenceClassification",
}
"""{objective: class that loads the base}; others are causal language models."""
_FIGURES = {
    "loss": "test loss, nats",
    "perplexity": "perplexity",
    "rouge_l": "ROUGE-L",
    "ended": "EOS rate: share of answers that end before the token limit",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "entity_f1": "entity F1",
    "precision": "precision of entities",
    "recall": "recall of entities",
    "tag_accuracy": "share of words with the right tag",
    "recall_at_1": "recall@1: share of queries whose passage is ranked first",
    "recall_at_5": "recall@5",
    "recall_at_10": "recall@10",
    "mrr_at_10": "MRR@10",
    "ndcg_at_10": "nDCG@10",
    "divergence": "divergence from the teacher, nats per token",
    "margin": "mean margin of preferred answers, nats",
    "chosen_reward": "mean reward of chosen answers",
    "rejected_reward": "mean reward of rejected answers",
    "reward_margin": "reward margin: mean reward of good or chosen answers less that of the others",
    "kl": "KL divergence from the base, nats (the reference point of KTO)",
    "reward_desirable": "mean reward of good answers",
    "reward_undesirable": "mean reward of bad answers",
    "reward_accuracy": "reward accuracy: share of pairs whose chosen answer gets the higher reward",
}
"""{key in the metrics: label}; other figures are labelled by their key."""


def model_card(record: Mapping[str, Any]) -> str:
    """Return the model card of a version's lineage record."""
    return f"---\n{_front_matter(record)}---\n\n{_text(record)}"


def ranks_in_words(ranks: Mapping[str, Any]) -> str:
    """Return the ranks of a record, such as "16 in 200 of 210 layers, 2 to 8 in 10". ranks: not empty."""
    layers, usual, others = ranks["layers"], ranks["usual"], ranks["others"].values()
    if not others:
        return f"{usual} in {'1 layer' if layers == 1 else f'all {layers} layers'}"
    least, most = min(others), max(others)
    rest = least if least == most else f"{least} to {most}"
    return f"{usual} in {layers - len(others)} of {layers} layers, {rest} in {len(others)}"


def _front_matter(record: Mapping[str, Any]) -> str:
    yaml = YAML(typ="safe")
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    text = io.StringIO()
    yaml.dump(_metadata(record), text)
    return text.getvalue()


def _metadata(record: Mapping[str, Any]) -> dict[str, Any]:
    params, metrics = record["params"], record["metrics"]
    method, objective = params["method"]["name"], params["train"].get("objective", "sft")
    task = _TASKS.get(objective, "text-generation")
    dataset = {"name": _source(params["data"]["source"]), "type": _source(params["data"]["source"]), "split": "test"}
    figures = [
        {"type": key, "name": _FIGURES.get(key, key), "value": value}
        for key, value in metrics["adapter"].items()
        if _is_figure(key, value)
    ]
    results = [{"task": {"type": task}, "dataset": dataset, "metrics": figures}] if figures else []
    return {
        "library_name": "peft",
        "base_model": _source(params["base"]["source"]),
        "base_model_relation": "adapter",
        "pipeline_tag": task,
        "tags": ["peftcore", method, objective],
        "model-index": [{"name": f"{record['name']} {record['version']}", "results": results}],
    }


def _text(record: Mapping[str, Any]) -> str:
    params = record["params"]
    return "\n".join(
        [
            f"# {escaped(record['name'])} {record['version']}",
            "",
            f"An adapter of {escaped(_source(params['base']['source']))}: method {escaped(params['method']['name'])}, "
            f"objective {escaped(params['train'].get('objective', 'sft'))}"
            f"{_quantised(params.get('quantization', {}))}. Registered {record['created']}.",
            "",
            *_section("Evaluation", _figures(record)),
            *_section("Evaluation by slice", _slices(record.get("slices") or {})),
            *_section("Merged model", _merge(record["metrics"].get("merge") or {})),
            *_section("Training data", _data(record)),
            *_section("Parameters", _parameters(record)),
            *_section("Lineage", _lineage(record)),
            *_section("How to load it", _loading(record)),
            *_section("Limitations", _limits(record)),
        ]
    )


def _section(title: str, lines: Iterable[str]) -> list[str]:
    lines = list(lines)
    return [f"## {title}", "", *lines, ""] if lines else []


def _figures(record: Mapping[str, Any]) -> list[str]:
    base, adapter = record["metrics"]["base"], record["metrics"]["adapter"]
    keys = [key for key in {**base, **adapter} if _is_figure(key, adapter.get(key)) or _is_figure(key, base.get(key))]
    rows = [(escaped(_FIGURES.get(key, key)), _number(base.get(key)), _number(adapter.get(key))) for key in keys]
    loss, baseline = (record["metrics"].get(part) for part in ("loss_function", "baseline"))
    notes = [f"Test loss: {escaped(loss_in_words(loss))}."] if loss else []
    if baseline:
        notes.append(f"The base has no trained head for this task. The baseline is {escaped(baseline)}.")
    return [
        *_table(("held-out rows", "baseline" if baseline else "base", "adapter"), rows),
        *(["", " ".join(notes)] if notes else []),
    ]


def _slices(slices: Mapping[str, Any]) -> list[str]:
    largest = sorted(slices.items(), key=lambda item: (-item[1]["rows"], item[0]))
    rows = [
        (escaped(name), str(one["rows"]), _number(one.get("base_loss")), _number(one.get("adapter_loss")))
        for name, one in largest[:SLICES]
    ]
    left = len(slices) - len(rows)
    more = ["", f"{left} smaller slices are in `registry/version.json`."] if left else []
    return [*_table(("slice", "rows", "base loss", "adapter loss"), rows), *more] if rows else []


def _merge(merge: Mapping[str, Any]) -> list[str]:
    if not merge:
        return []
    if "cosine" in merge:
        return [
            f"Merged model against base and adapter apart: mean cosine similarity of embeddings "
            f"{_number(merge['cosine'])}, nearest passages agree for {_number(merge.get('top1_agreement'))}."
        ]
    return [
        f"Merged model against base and adapter apart: KL divergence {_number(merge.get('kl'))} nats per prediction, "
        f"top-1 agreement {_number(merge.get('top1_agreement'))}."
    ]


def _data(record: Mapping[str, Any]) -> list[str]:
    data, hashes = record.get("data") or {}, record["dvc"]
    lines = [f"- source: {escaped(_source(record['params']['data']['source']))}"]
    if data:
        rows = ", ".join(f"{count} {escaped(split)}" for split, count in data["rows"].items())
        dropped = ", ".join(f"{count} {escaped(why)}" for why, count in data["dropped"].items())
        lines += [f"- rows: {rows}, of {data['examples']} examples", f"- dropped: {dropped or 'nothing'}"]
    if "artifacts/data" in hashes:
        lines += [f"- prepared data: `{hashes['artifacts/data']}` (DVC, MD5)"]
    return [*lines, f"- test rows: `{record['evaluation_set']}` (SHA-256)"]


def _parameters(record: Mapping[str, Any]) -> list[str]:
    method, train = record["params"]["method"], record["params"]["train"]
    keys = [("method", key) for key in ("r", "lora_alpha", "lora_dropout", "target_modules", "options")]
    keys += [("train", key) for key in ("epochs", "max_steps", "batch_size", "gradient_accumulation", "learning_rate")]
    sections = {"method": method, "train": train}
    rows = [
        (f"`{section}.{key}`", f"`{_code(sections[section][key])}`")
        for section, key in keys
        if sections[section].get(key) not in (None, {})
    ]
    rows.append(("`project.seed`", f"`{_code(record['params']['project']['seed'])}`"))
    if ranks := record.get("ranks"):
        rows.append(("ranks", ranks_in_words(ranks)))
    if (count := record["metrics"].get("training", {}).get("trainable_parameters")) is not None:
        rows.append(("trainable parameters", f"{count:,}"))
    return _table(("parameter", "value"), rows)


def _lineage(record: Mapping[str, Any]) -> list[str]:
    changed = record["git"]["uncommitted"]
    more = f", with {len(changed)} uncommitted files" if changed else ""
    software = ", ".join(f"{escaped(name)} {escaped(number)}" for name, number in record["software"].items())
    calibrated = record.get("calibrated_base")
    return [
        f"- code: commit `{record['git']['commit']}`{more}; the tag `{record['name']}@{record['version']}` holds all",
        f"- base model: `{record['base_model']}` (SHA-256)",
        *([f"- calibrated base: `{calibrated}` (SHA-256)"] if calibrated else []),
        f"- adapter: `{record['adapter']['content']}` (SHA-256 of its manifest)",
        f"- software: {software}",
        f"- rebuild and compare: `peftcore reproduce {record['version']}`",
    ]


def _loading(record: Mapping[str, Any]) -> list[str]:
    objective = record["params"]["train"].get("objective")
    loader = _LOADERS.get(objective, "AutoModelForCausalLM")
    labels = record.get("data", {}).get("labels", [])
    outputs = 1 if objective in ("reward", "reranker") else len(labels)
    options = f", num_labels={outputs}" if outputs else ""
    tag, base, calibrated, note = f"{record['name']}@{record['version']}", "BASE", [], []
    classes = loader
    if record.get("calibrated_base"):
        base, calibrated = "calibrated", [f"dvc get . artifacts/calibrated --rev {tag}"]
        note = ["The adapter fits its calibrated base alone. A base that is quantised anew is another one.", ""]
    elif CORRECTED_STORAGE in record["adapter"]["files"]:
        note = ["The adapter corrects what quantising the base lost. It is worse on the base in 16 bits.", ""]
        stored = record["params"]["quantization"]
        computed = "bfloat16" if stored["compute_dtype"] == "auto" else stored["compute_dtype"]
        classes = f"{loader}, BitsAndBytesConfig"
        quantised = (
            f'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="{stored["storage"]}", '
            f'bnb_4bit_use_double_quant={stored["double_quant"]}, bnb_4bit_compute_dtype="{computed}")'
            if stored["storage"] in ("nf4", "fp4")
            else "BitsAndBytesConfig(load_in_8bit=True)"
        )
        options += f", quantization_config={quantised}"
    return [
        *note,
        "```sh",
        f"dvc artifacts get . {record['name']} --rev {record['version']} --out adapter",
        *calibrated,
        "```",
        "",
        "```python",
        f"from transformers import {classes}",
        "from peftcore import PeftModel  # or: from peft import PeftModel",
        "",
        f'model = PeftModel.from_pretrained({loader}.from_pretrained("{base}"{options}), "adapter")',
        "```",
        *_pooling(record["params"]["train"]),
        *(
            ["", "Outputs: " + ", ".join(f"{number} {escaped(name)}" for number, name in enumerate(labels))]
            if labels
            else []
        ),
    ]


def _pooling(train: Mapping[str, Any]) -> list[str]:
    """Return a line on how a text's vector comes from the hidden states; nothing for other objectives."""
    if train.get("objective") != "embedding":
        return []
    options = train["embedding"]
    scaled = ", divided by its length" if options["normalize"] else ""
    pooled = {"mean": "mean of its tokens' last hidden states", "cls": "first token's last hidden state"}
    of = pooled.get(options["pooling"], "last token's last hidden state")
    return ["", f"A text's embedding is the {of}{scaled}."]


def _limits(record: Mapping[str, Any]) -> list[str]:
    rows = sum(one["rows"] for one in (record.get("slices") or {}).values())  # evaluate.rows limits them
    held_out = f"{rows} held-out rows" if rows else "held-out rows"
    quantised = record["params"].get("quantization", {}).get("storage", "none") != "none"
    return [
        f"- Evaluated only on {held_out} from the source of the training data; its behaviour on other input was not "
        "measured.",
        "- Errors and biases of the base model also apply to the adapter.",
        *(["- Trained on a quantised base: the figures differ on another precision of the base."] if quantised else []),
    ]


def _quantised(quantization: Mapping[str, Any]) -> str:
    storage = quantization.get("storage", "none")
    return "" if storage == "none" else f", on the base in {escaped(storage)}"


def _source(source: str) -> str:
    """Return the name of a data source without its scheme, revision and local folders."""
    kind, _, rest = source.partition(":")
    if kind in ("hub", "wheel", "stdlib"):
        return rest.partition("@")[0].partition("==")[0]
    return PurePath(rest if kind == "path" else source).name or source


def _is_figure(key: str, value: Any) -> bool:
    return type(value) in (int, float) and key not in ("tokens_per_second", "rows")


def _number(value: Any) -> str:
    return f"{value:.4g}" if type(value) in (int, float) else ""


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [head, ("---",) * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def escaped(text: Any) -> str:
    """Escape text so that it contains no Markdown, HTML, table border or newline."""
    plain = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{character}" if character in "\\`*_[]|~#!$" else character for character in plain)


def _code(text: Any) -> str:
    """Return text that can stand between backticks in a table cell."""
    return " ".join(str(text).split()).replace("`", "'").replace("|", "\\|")
