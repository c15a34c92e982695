"""A `tokenizer.json` as GGUF's key/values.

llama.cpp cuts text into words by code of its own, chosen by a name (`tokenizer.ggml.pre`); a tokenizer that cuts in a
way without such a name here is refused. SentencePiece's BPE is told by byte fallback; its scores are merges' ranks.
"""

import json
from pathlib import Path
from typing import Any

import gguf

from peftcore.errors import ExportError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_REST}": "qwen2",
}
"""{expression that words match: llama.cpp's name}"""
_NORMALIZERS = (None, "NFC")
"""NFC is not done by llama.cpp, nor by its own converter's files; text is NFC nearly always."""


class Tokenizer:
    """The tokenizer of a transformers folder. Raises ExportError for one that has no GGUF here."""

    def __init__(self, folder: Path, size: int):
        self._folder, self._size = folder, size
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ExportError(
                f"{folder} holds no tokenizer.json, which a GGUF's tokenizer is made of; save the fast tokenizer there "
                "(AutoTokenizer.from_pretrained(...).save_pretrained(folder))"
            )
        self._json: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self._model: dict[str, Any] = self._json["model"]
        if self._model.get("type") != "BPE":
            raise self._refusal(f"its model is {self._model.get('type')!r}, not BPE")
        self._sentencepiece = bool(self._model.get("byte_fallback"))
        self._pre = "default" if self._sentencepiece else self._words()
        largest = max((*self._model["vocab"].values(), *(token["id"] for token in self._json["added_tokens"])))
        if largest >= size:
            raise self._refusal(f"it has a token {largest}, and the model {size} rows of embeddings")

    def _refusal(self, why: str) -> ExportError:
        return ExportError(
            f"{self._folder / 'tokenizer.json'} has no GGUF here ({why}); give the base's own GGUF file (--gguf), or "
            "merge and use llama.cpp's convert_hf_to_gguf.py"
        )

    def _words(self) -> str:
        """llama.cpp's name of how a byte-level tokenizer cuts text into words."""
        if (self._json["normalizer"] or {}).get("type") not in _NORMALIZERS:
            raise self._refusal(f"its normalizer is {self._json['normalizer']['type']!r}")
        cuts = self._json["pre_tokenizer"] or {}
        steps: list[dict[str, Any]] = cuts["pretokenizers"] if cuts.get("type") == "Sequence" else [cuts]
        *before, last = steps
        if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
            raise self._refusal("it does not end in ByteLevel without a space put first")
        if last.get("use_regex", True):
            digits = [step.get("type") == "Digits" and bool(step.get("individual_digits")) for step in before]
            if digits in ([], [True]):
                return "smollm" if digits else "gpt-2"
        elif len(before) == 1 and before[0].get("type") == "Split" and before[0].get("behavior") == "Isolated":
            name = _WORDS.get(before[0]["pattern"].get("Regex", ""))
            if name == "llama-bpe" or (name == "qwen2" and not self._model.get("ignore_merges")):
                return name
        raise self._refusal(f"llama.cpp has no known name for its way to words, {json.dumps(steps)[:300]}")

    def write_keys(self, writer: gguf.GGUFWriter) -> None:
        """Write tokens, their kinds and merges or scores, special tokens and the chat template."""
        tokens = [f"[PAD{number}]" for number in range(self._size)]
        kinds = [gguf.TokenType.UNUSED] * self._size
        for token, number in self._model["vocab"].items():
            tokens[number], kinds[number] = token, self._kind(token)
        for added in self._json["added_tokens"]:
            special = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
            unknown = self._sentencepiece and added["content"] == self._model.get("unk_token")
            tokens[added["id"]] = added["content"]
            kinds[added["id"]] = gguf.TokenType.UNKNOWN if unknown else special
        writer.add_tokenizer_model("llama" if self._sentencepiece else "gpt2")
        writer.add_tokenizer_pre(self._pre)
        writer.add_token_list(tokens)
        if self._sentencepiece:
            writer.add_token_scores(self._scores(tokens))
            writer.add_add_space_prefix(self._puts_space_first())
        writer.add_token_types(kinds)
        special = gguf.SpecialVocab(self._folder, load_merges=not self._sentencepiece, n_vocab=self._size)
        special.add_special_token = {"bos": False, "eos": False} | special.add_special_token  # llama.cpp would guess
        special.add_to_gguf(writer, quiet=True)

    def _kind(self, token: str) -> gguf.TokenType:
        is_byte = self._sentencepiece and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        return gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL

    def _scores(self, tokens: list[str]) -> list[float]:
        """SentencePiece joins what has the highest score first, which is the merge of the lowest rank."""
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(self._model["merges"]):
            ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
        return [-float(ranks.get(token, len(ranks))) for token in tokens]

    def _puts_space_first(self) -> bool:
        text = json.dumps([self._json["normalizer"], self._json["pre_tokenizer"]])
        return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text
