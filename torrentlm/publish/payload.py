"""The small files of a model torrent: which files of a checkpoint belong into it, and their one deterministic form."""

from __future__ import annotations

import json
import re
from typing import Any

from torrentlm.errors import ArtifactError

_PAYLOAD = re.compile(
    r"""config\.json | generation_config\.json | preprocessor_config\.json
    | tokenizer(_config)?\.json | special_tokens_map\.json | added_tokens\.json | chat_template\.(json|jinja)
    | modules\.json | sentence_bert_config\.json | config_sentence_transformers\.json | \d+_[A-Za-z]+/config\.json
    | vocab\.(json|txt) | merges\.txt | [A-Za-z0-9_.-]+\.(model|tiktoken)
    | (LICEN[CS]E|NOTICE)[A-Za-z0-9_.-]*""",
    re.VERBOSE,
)

_TIDIED = re.compile(r"(config|generation_config|tokenizer_config|preprocessor_config)\.json")

_VOLATILE = frozenset(
    (
        "_commit_hash",
        "_model_name_or_path",
        "_name_or_path",
        "auto_map",  # names code, which is published only where it is needed: publish/checkpoint.py
        "is_local",
        "local_files_only",
        "name_or_path",
        "transformers_version",
    )
)
"""Keys that say something about a machine, a path or a moment, not about the model."""


def is_payload(name: str) -> bool:
    """Whether a checkpoint's file of this name goes into the model torrent."""
    return _PAYLOAD.fullmatch(name) is not None


def tidy(name: str, content: bytes) -> bytes:
    """The file's published form: settings as JSON with sorted keys and without volatile ones, the rest as it is.

    Raises ArtifactError if such a file is not a JSON object.
    """
    if not _TIDIED.fullmatch(name):
        return content
    try:
        settings = json.loads(content)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ArtifactError(f"the checkpoint's {name} is not a JSON object; fetch it again")
    return to_json(_without_volatile(settings))


def to_json(settings: dict[str, Any]) -> bytes:
    return json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_volatile(item) for key, item in value.items() if key not in _VOLATILE}
    if isinstance(value, list):
        return [_without_volatile(item) for item in value]
    return value
