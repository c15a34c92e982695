"""A `tokenizer.json` as GGUF metadata (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer).

llama.cpp splits text into words by its own code, which `tokenizer.ggml.pre` selects by name. A tokenizer is refused if
this module knows no name for its way of splitting. A BPE model with byte fallback is taken as SentencePiece; the scores
of its tokens are the negative ranks of their merges.
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
"""{regular expression of the words: llama.cpp's name}"""
_NORMALIZERS = (None, "NFC")
"""Normalizers that are accepted. llama.cpp does not apply NFC, but nearly all text is in NFC already."""


class Tokenizer:
    """The tokenizer of a transformers folder, for export to GGUF.

    Args:
        folder: the transformers folder.
        size: rows of the model's embeddings (count).

    Raises:
        ExportError: the tokenizer is missing or not supported.
    """

    def __init__(self, folder: Path, size: int):
        self._folder, self._size = folder, size
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ExportError(
                f"{folder} holds no tokenizer.json, which GGUF export needs; save the fast tokenizer there "
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
            raise self._refusal(f"it has a token {largest}, and the model only {size} rows of embeddings")

    def _refusal(self, why: str) -> ExportError:
        return ExportError(
            f"{self._folder / 'tokenizer.json'} cannot be exported to GGUF ({why}); give the base's own GGUF file "
            "(--gguf), or merge and use llama.cpp's convert_hf_to_gguf.py"
        )

    def _words(self) -> str:
        """Return llama.cpp's name for the way in which a byte-level tokenizer splits text into words."""
        if (self._json["normalizer"] or {}).get("type") not in _NORMALIZERS:
            raise self._refusal(f"its normalizer is {self._json['normalizer']['type']!r}")
        cuts = self._json["pre_tokenizer"] or {}
        steps: list[dict[str, Any]] = cuts["pretokenizers"] if cuts.get("type") == "Sequence" else [cuts]
        *before, last = steps
        if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
            raise self._refusal("its pre-tokenizer must end with ByteLevel and add_prefix_space=false")
        if last.get("use_regex", True):
            digits = [step.get("type") == "Digits" and bool(step.get("individual_digits")) for step in before]
            if digits in ([], [True]):
                return "smollm" if digits else "gpt-2"
        elif len(before) == 1 and before[0].get("type") == "Split" and before[0].get("behavior") == "Isolated":
            name = _WORDS.get(before[0]["pattern"].get("Regex", ""))
            if name == "llama-bpe" or (name == "qwen2" and not self._model.get("ignore_merges")):
                return name
        raise self._refusal(f"llama.cpp has no known name for its pre-tokenizer, {json.dumps(steps)[:300]}")

    def write_keys(self, writer: gguf.GGUFWriter) -> None:
        """Write tokens, token types, merges or scores, special tokens and the chat template."""
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
            writer.add_add_space_prefix(self._adds_space_prefix())
        writer.add_token_types(kinds)
        special = gguf.SpecialVocab(self._folder, load_merges=not self._sentencepiece, n_vocab=self._size)
        # without these keys llama.cpp guesses whether to add BOS and EOS
        special.add_special_token = {"bos": False, "eos": False} | special.add_special_token
        special.add_to_gguf(writer, quiet=True)

    def _kind(self, token: str) -> gguf.TokenType:
        is_byte = self._sentencepiece and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        return gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL

    def _scores(self, tokens: list[str]) -> list[float]:
        """Return the tokens' scores; SentencePiece merges the highest score first, BPE the lowest rank."""
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(self._model["merges"]):
            ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
        return [-float(ranks.get(token, len(ranks))) for token in tokens]

    def _adds_space_prefix(self) -> bool:
        text = json.dumps([self._json["normalizer"], self._json["pre_tokenizer"]])
        return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text
