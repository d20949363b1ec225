"""A model's tokenizer, the tokens that end its texts and how long these may be, from the model torrent's small files.

Needs no torch: clients have this and no weights.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torrentlm.errors import ArtifactError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SETTINGS = 1 << 20
VOCABULARY = re.compile(r"tokenizer\.json|vocab\.(json|txt)|[A-Za-z0-9_.-]+\.(model|tiktoken)")
"""Names of files that hold a tokenizer's vocabulary."""
_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes that tokenizer.json describes completely. AutoTokenizer would choose the same, after importing torch."""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``, never code that comes with it. Raises ArtifactError if there is none that can be
    read.
    """
    named = _settings(folder / "tokenizer_config.json").get("tokenizer_class")
    if named in _GENERIC and (folder / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast as Tokenizer
    else:
        from transformers import AutoTokenizer as Tokenizer
    try:
        tokenizer = Tokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(": ")
        raise ArtifactError(
            f"this model's tokenizer cannot be read ({reason}): publish the model again with it"
        ) from error
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether the model torrent brought a vocabulary."""
    return any(path.is_file() and VOCABULARY.fullmatch(path.name) for path in folder.iterdir())


def stop_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """The ids that end a text: generation_config's if it names any, else config's, else the tokenizer's own."""
    for name in ("generation_config.json", "config.json"):
        found = _settings(folder / name).get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
        if all(type(token) is int for token in ids):
            return tuple(ids)
    return () if tokenizer is None or tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)


def decoder_start(folder: Path) -> int | None:
    """The token that a decoder begins with after an encoder has read: the files' own, else their first of a text."""
    for key in ("decoder_start_token_id", "bos_token_id"):
        for name in ("generation_config.json", "config.json"):
            found = _settings(folder / name).get(key)
            if type(found) is int:
                return found
    return None


def context_length(folder: Path) -> int | None:
    """The longest text in tokens that the model is made for, if its config.json says."""
    return _of_text(folder, "max_position_embeddings")


def vocabulary_size(folder: Path) -> int | None:
    """The width of the model's logits, if its config.json says."""
    return _of_text(folder, "vocab_size")


def _of_text(folder: Path, key: str) -> int | None:
    settings = _settings(folder / "config.json")
    text = settings.get("text_config")
    found = (text if isinstance(text, dict) else settings).get(key)
    return found if type(found) is int and found > 0 else None


def _settings(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_SETTINGS:
            return {}
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}
