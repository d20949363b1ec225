"""What a checkpoint must have before its weights are read, and what no weight may be: each refusal is one sentence."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import transformers
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

from torrentlm.compute.skeleton import first_line
from torrentlm.compute.tokenizer import VOCABULARY, load_tokenizer
from torrentlm.errors import ArtifactError, UnsupportedModelError

log = logging.getLogger(__name__)

_SHOWN = 5

# The bits of infinity without a sign: a floating number is finite if it is below them, as integers of its size compare.
_INFINITY = {
    "F64": (np.int64, 0x7FF0 << 48),
    "F32": (np.int32, 0x7F80 << 16),
    "BF16": (np.int16, 0x7F80),
    "F16": (np.int16, 0x7C00),
    "F8_E5M2": (np.int8, 0x7C),
    "F8_E4M3": (np.int8, 0x7F),  # has no infinity, and one NaN
}


def require_known(config_json: bytes, where: Path) -> None:
    """Raise UnsupportedModelError unless transformers knows the architecture that the checkpoint's config names, or the
    checkpoint has code of its own for it.
    """
    settings = json.loads(config_json)
    named = settings.get("model_type")
    if "auto_map" in settings:
        return
    if not isinstance(named, str) or not named:
        raise UnsupportedModelError(f"config.json of {where} names no model_type; fetch the model's own config.json")
    if named not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} does not know the architecture {named[:100]!r} of {where};"
            " update transformers, or publish a model of another architecture"
        )


def require_tokenizer(files: Collection[str], where: Path) -> None:
    """Raise ArtifactError unless one of these files of a checkpoint is a tokenizer's vocabulary."""
    if not any(VOCABULARY.fullmatch(name) for name in files):
        raise ArtifactError(
            f"{where} has no tokenizer (tokenizer.json, tokenizer.model or vocab files); fetch it too, or say"
            " tokenizer = false in [model] (--no-tokenizer) if users are to send token ids"
        )


def require_readable_tokenizer(files: Mapping[str, bytes], where: Path) -> int:
    """How many words the tokenizer among a checkpoint's small files knows, without those that were added to it.

    Raises ArtifactError if it cannot be loaded: every user would hear of it.
    """
    name = "tokenizer.json" if "tokenizer.json" in files else "the tokenizer"
    with TemporaryDirectory(prefix="torrentlm-") as folder:
        try:
            if "tokenizer.json" in files:
                path = Path(folder, "tokenizer.json")
                path.write_bytes(files["tokenizer.json"])
                return int(PreTrainedTokenizerFast(tokenizer_file=str(path)).vocab_size)
            for file, content in files.items():
                Path(folder, file).write_bytes(content)
            return int(load_tokenizer(Path(folder)).vocab_size)
        except Exception as error:  # whatever the library makes of it
            reason = first_line(error.__cause__ or error)
            raise ArtifactError(
                f"{name} of {where} cannot be read ({reason}); fetch it again, or say tokenizer ="
                " false in [model] (--no-tokenizer) if users are to send token ids"
            ) from error


def require_known_words(words: int, known: int, where: Path) -> None:
    """Raise ArtifactError if a tokenizer of so many ``words`` makes ids beyond the ``known`` ones of the model (0: it
    does not say). A word that was added (padding, say) may be unknown: models are published like that, and never see
    it.
    """
    if 0 < known < words:
        raise ArtifactError(
            f"the tokenizer of {where} has {words:,} words where the model knows {known:,}: it is another model's;"
            " fetch the right one, or say tokenizer = false in [model] (--no-tokenizer) if users are to send token ids"
        )


def all_finite(chunk: memoryview, dtype: str) -> bool:
    """Whether no element is NaN or infinite; whole elements of ``dtype`` (safetensors' name), little-endian.

    Two passes of integer comparison, many times faster than reading the chunk from a disk was.
    """
    if dtype == "F8_E8M0":
        return len(chunk) == 0 or int(np.frombuffer(chunk, np.uint8).max()) < 0xFF
    if dtype not in _INFINITY or len(chunk) == 0:
        return True
    signed, infinity = _INFINITY[dtype]
    bits = np.frombuffer(chunk, signed)
    if int(bits.max()) >= infinity:
        return False
    sign = 1 << (8 * bits.itemsize - 1)
    return int(bits.view(f"u{bits.itemsize}").max()) < sign + infinity


class Finiteness:
    """Sees every chunk that is published, and refuses NaN and infinity, or with ``allowed`` only tells of them."""

    def __init__(self, where: Path, *, allowed: bool) -> None:
        self._where = where
        self._allowed = allowed
        self._found: dict[str, None] = {}

    def __call__(self, name: str, chunk: memoryview, dtype: str) -> None:
        """Raises ArtifactError with the name of the tensor."""
        if name in self._found or all_finite(chunk, dtype):
            return
        if not self._allowed:
            raise ArtifactError(
                f"tensor {name} of {self._where} has values that are NaN or infinite as {dtype}; fetch the checkpoint"
                " again or publish another precision, or say allow_nan = true in [model] (--allow-nan) to publish it so"
            )
        self._found[name] = None

    @property
    def found(self) -> Sequence[str]:
        """Names of the tensors with such values, if they are allowed."""
        return tuple(self._found)

    def tell(self) -> None:
        """Warn of what was found."""
        if self._found:
            names = list(self._found)
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            shown = ", ".join(names[:_SHOWN]) + more
            log.warning("published with NaN or infinite values, as allowed: %s", shown)
