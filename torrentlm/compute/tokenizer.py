"""A model's tokenizer and the tokens that end its texts, from the files that the model torrent carries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torrentlm.errors import ArtifactError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SETTINGS = 1 << 20


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``, never code that comes with it. Raises ArtifactError if there is none that can be
    read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ArtifactError(
            f"this model's tokenizer cannot be read ({reason}): publish the model again with it"
        ) from error
    return tokenizer


def stop_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that end a text: generation_config's if it names any, else config's, else the tokenizer's own."""
    for name in ("generation_config.json", "config.json"):
        found = _settings(folder / name).get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
        if all(type(token) is int for token in ids):
            return tuple(ids)
    return () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)


def _settings(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_SETTINGS:
            return {}
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}
