"""A version's model card, in the form that the Hugging Face hub reads: YAML front matter, then Markdown.

It is written from the lineage record alone, so it can be made for any version. What comes from data (names of slices,
sources) is escaped, and a folder of this machine is told by its last name only.
"""

import io
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from ruamel.yaml import YAML

CARD = "registry/README.md"
"""Where a version's own commit keeps it."""
SLICES = 12
"""Slices that are shown, the largest first."""

_TASKS = {"classification": "text-classification"}
_FIGURES = {
    "loss": "test loss, nats a token",
    "perplexity": "perplexity",
    "rouge_l": "ROUGE-L",
    "ended": "share of answers that end by themselves",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "reward_accuracy": "share of pairs judged right",
}
"""Figures by their keys in the metrics, and what a reader calls them; others go by their key."""


def model_card(record: Mapping[str, Any]) -> str:
    """The card of the version with this lineage record."""
    return f"---\n{_front_matter(record)}---\n\n{_text(record)}"


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
            *_section("What it reaches", _figures(record)),
            *_section("By slice", _slices(record.get("slices") or {})),
            *_section("Merged into its base", _merge(record["metrics"].get("merge") or {})),
            *_section("Training data", _data(record)),
            *_section("Parameters", _parameters(record)),
            *_section("Where it comes from", _lineage(record)),
            *_section("How to load it", _loading(record)),
            *_section("Limits", _limits(record)),
        ]
    )


def _section(title: str, lines: Iterable[str]) -> list[str]:
    lines = list(lines)
    return [f"## {title}", "", *lines, ""] if lines else []


def _figures(record: Mapping[str, Any]) -> list[str]:
    base, adapter = record["metrics"]["base"], record["metrics"]["adapter"]
    keys = [key for key in {**base, **adapter} if _is_figure(key, adapter.get(key)) or _is_figure(key, base.get(key))]
    rows = [(escaped(_FIGURES.get(key, key)), _number(base.get(key)), _number(adapter.get(key))) for key in keys]
    return _table(("held-out rows", "base", "adapter"), rows)


def _slices(slices: Mapping[str, Any]) -> list[str]:
    largest = sorted(slices.items(), key=lambda item: (-item[1]["rows"], item[0]))
    rows = [
        (escaped(name), str(one["rows"]), _number(one.get("base_loss")), _number(one.get("adapter_loss")))
        for name, one in largest[:SLICES]
    ]
    left = len(slices) - len(rows)
    more = ["", f"And {left} smaller ones, in `registry/version.json`."] if left else []
    return [*_table(("slice", "rows", "base loss", "adapter loss"), rows), *more] if rows else []


def _merge(merge: Mapping[str, Any]) -> list[str]:
    if not merge:
        return []
    return [
        f"Between the merged and the adapted model: KL {_number(merge.get('kl'))} nats a token; they agree on "
        f"{_number(merge.get('top1_agreement'))} of first choices."
    ]


def _data(record: Mapping[str, Any]) -> list[str]:
    data, hashes = record.get("data") or {}, record["dvc"]
    lines = [f"- source: {escaped(_source(record['params']['data']['source']))}"]
    if data:
        rows = ", ".join(f"{count} {escaped(split)}" for split, count in data["rows"].items())
        dropped = ", ".join(f"{count} {escaped(why)}" for why, count in data["dropped"].items())
        lines += [f"- rows: {rows}, of {data['examples']} examples", f"- left out: {dropped or 'nothing'}"]
    if "artifacts/data" in hashes:
        lines += [f"- as tokenised: `{hashes['artifacts/data']}` (DVC, MD5)"]
    return [*lines, f"- the test rows: `{record['evaluation_set']}` (SHA-256)"]


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
        others = f", others in {len(ranks['others'])}" if ranks["others"] else ""
        rows.append(("ranks", f"{ranks['usual']} in most of {ranks['layers']} layers{others}"))
    if (count := record["metrics"].get("training", {}).get("trainable_parameters")) is not None:
        rows.append(("trainable parameters", f"{count:,}"))
    return _table(("parameter", "value"), rows)


def _lineage(record: Mapping[str, Any]) -> list[str]:
    changed = record["git"]["uncommitted"]
    more = f", with {len(changed)} uncommitted files" if changed else ""
    software = ", ".join(f"{escaped(name)} {escaped(number)}" for name, number in record["software"].items())
    return [
        f"- code: commit `{record['git']['commit']}`{more}; the tag `{record['name']}@{record['version']}` holds all",
        f"- base model: `{record['base_model']}` (SHA-256)",
        f"- adapter: `{record['adapter']['content']}` (SHA-256 of its manifest)",
        f"- made by: {software}",
        f"- made again and compared by: `peftcore reproduce {record['version']}`",
    ]


def _loading(record: Mapping[str, Any]) -> list[str]:
    kind = "SequenceClassification" if record["params"]["train"].get("objective") == "classification" else "CausalLM"
    return [
        "```sh",
        f"dvc artifacts get . {record['name']} --rev {record['version']} --out adapter",
        "```",
        "",
        "```python",
        f"from transformers import AutoModelFor{kind}",
        "from peftcore import PeftModel  # or: from peft import PeftModel",
        "",
        f'model = PeftModel.from_pretrained(AutoModelFor{kind}.from_pretrained("BASE"), "adapter")',
        "```",
    ]


def _limits(record: Mapping[str, Any]) -> list[str]:
    rows = (record.get("data") or {}).get("rows", {}).get("test")
    held_out = f"{rows} held-out rows" if rows else "held-out rows"
    quantised = record["params"].get("quantization", {}).get("storage", "none") != "none"
    return [
        f"- Judged on {held_out} of the same source as its training data, and on nothing else; what it does on other "
        "input was not measured.",
        "- What the base gets wrong, or should not say, the adapter can get wrong or say too.",
        *(["- Trained on a quantised base: on another precision of it the figures are others."] if quantised else []),
    ]


def _quantised(quantization: Mapping[str, Any]) -> str:
    storage = quantization.get("storage", "none")
    return "" if storage == "none" else f", on the base in {escaped(storage)}"


def _source(source: str) -> str:
    """A name without its scheme, and without folders of this machine."""
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
    """Text in which nothing is Markdown, HTML, a table's border or a new line."""
    plain = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{character}" if character in "\\`*_[]|~#!$" else character for character in plain)


def _code(text: Any) -> str:
    """Text that stands between backticks in a table's cell."""
    return " ".join(str(text).split()).replace("`", "'").replace("|", "\\|")
