"""Checkpoints that are refused, with one sentence each."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tests.unit.publish.models import listing, read_back, same_tensors, save_llama
from torrentlm.config import Recipe
from torrentlm.errors import ArtifactError, TorrentLMError, UnsupportedModelError
from torrentlm.publish.checks import all_finite, require_known_words
from torrentlm.publish.publish import publish
from torrentlm.swarm.store import Store

TENSOR = "model.layers.2.mlp.up_proj.weight"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "data") as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_llama(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def put(folder: Path, value: float, name: str = TENSOR) -> dict[str, torch.Tensor]:
    """Write ``value`` as the last element of one tensor of the checkpoint."""
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors[name].view(-1)[-1] = value
    safetensors.torch.save_file(tensors, path)
    return tensors


def refusal(recipe: Recipe, store: Store, error: type[TorrentLMError]) -> str:
    before = listing(store.data)
    with pytest.raises(error) as caught:
        publish(recipe, store)
    assert listing(store.data) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_of_every_kind_is_seen(dtype: str) -> None:
    """All bit patterns of the small types, a sample of the large ones, against torch."""
    kind = DTYPES[dtype]
    if kind.itemsize <= 2:
        bits = np.arange(1 << 8 * kind.itemsize, dtype=f"u{kind.itemsize}")
    else:
        patterns = np.random.default_rng(0).integers(0, 1 << 16, 2000).astype(f"u{kind.itemsize}")
        bits = np.concatenate([patterns << (8 * kind.itemsize - 16), (patterns << (8 * kind.itemsize - 16)) - 1])
    values = torch.from_numpy(bits.view(np.uint8)).view(kind).to(torch.float64)
    found = [all_finite(memoryview(bits[at : at + 1].tobytes()), dtype) for at in range(len(bits))]
    assert found == torch.isfinite(values).tolist()
    assert True in found
    assert False in found
    finite = bits[np.array(found)]
    assert all_finite(memoryview(finite.tobytes()), dtype)
    for place in (0, len(finite) // 2, len(finite)):
        bad = np.insert(finite, place, bits[np.array(found).argmin()])
        assert not all_finite(memoryview(bad.tobytes()), dtype)


def test_what_is_no_floating_number_is_finite() -> None:
    assert all_finite(memoryview(b"\xff" * 64), "I64")
    assert all_finite(memoryview(b""), "F32")
    assert all_finite(memoryview(b"\xfe"), "F8_E8M0")
    assert not all_finite(memoryview(b"\xff"), "F8_E8M0")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_must_be_finite(value: float, folder: Path, store: Store) -> None:
    put(folder, value)
    said = refusal(Recipe("m", folder), store, ArtifactError)
    assert f"tensor {TENSOR} of {folder}" in said
    assert "--allow-nan" in said


def test_finite_in_one_precision_alone(folder: Path, store: Store) -> None:
    put(folder, 1e6)
    assert f"{TENSOR} of {folder} has values that are NaN or infinite as F16" in refusal(
        Recipe("m", folder, dtype="F16"), store, ArtifactError
    )
    publish(Recipe("m", folder), store)


def test_nan_may_be_allowed(folder: Path, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    put(folder, float("inf"), "model.norm.weight")
    tensors = put(folder, float("-inf"))
    with caplog.at_level(logging.WARNING):
        published = publish(Recipe("m", folder, allow_nan=True), store)
    assert caplog.messages == [f"published with NaN or infinite values, as allowed: {TENSOR}, model.norm.weight"]
    assert same_tensors(read_back(published, store), tensors)
    assert publish(Recipe("m", folder), store) == published  # it is there already


def test_what_no_block_reads_may_be_anything(folder: Path, store: Store) -> None:
    path = folder / "model.safetensors"
    safetensors.torch.save_file({**safetensors.torch.load_file(path), "junk": torch.tensor([float("nan")])}, path)
    assert publish(Recipe("m", folder), store).left_out == ("junk",)


def test_a_tokenizer_must_be_there(folder: Path, store: Store) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text("{}")
    said = refusal(Recipe("m", folder), store, ArtifactError)
    assert said.startswith(f"{folder} has no tokenizer")
    assert "--no-tokenizer" in said
    assert publish(Recipe("m", folder, tokenizer=False), store).manifest.name == "m"


def test_any_vocabulary_will_do(folder: Path, store: Store) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b")))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    publish(Recipe("m", folder), store)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "qwen.tiktoken", "spiece.model"])
def test_a_vocabulary_that_cannot_be_read(name: str, folder: Path, store: Store) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / name).write_bytes(bytes(range(256)))
    said = refusal(Recipe("m", folder), store, ArtifactError)
    assert said.startswith(f"the tokenizer of {folder} cannot be read (") and "--no-tokenizer" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("no-such-thing", "does not know the architecture 'no-such-thing'"),
        (None, "names no model_type"),
        (["llama"], "names no model_type"),
    ],
)
def test_unknown_architecture(model_type: object, says: str, folder: Path, store: Store) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    said = refusal(Recipe("m", folder), store, UnsupportedModelError)
    assert says in said
    assert str(folder) in said


def test_a_tokenizer_that_nobody_can_read(folder: Path, store: Store) -> None:
    (folder / "tokenizer.json").write_text("{")
    sentence = refusal(Recipe("Tiny", folder), store, ArtifactError)
    assert f"tokenizer.json of {folder} cannot be read" in sentence and "--no-tokenizer" in sentence
    assert publish(Recipe("Tiny", folder, tokenizer=False), store).model.name == "Tiny"


@pytest.mark.parametrize("head", ["LlamaForSequenceClassification", "LlamaForTokenClassification"])
def test_a_head_for_another_task(head: str, folder: Path, store: Store) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"architectures": [head]}))
    sentence = refusal(Recipe("Tiny", folder), store, UnsupportedModelError)
    assert f"{head} has a head for another task" in sentence and "architectures" in sentence


def test_more_layers_than_can_be_meant(folder: Path, store: Store) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 10**7}))
    sentence = refusal(Recipe("Tiny", folder), store, UnsupportedModelError)
    assert "num_hidden_layers = 10,000,000" in sentence


def test_a_wrong_value_is_named(folder: Path, store: Store) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"hidden_size": "x"}))
    sentence = refusal(Recipe("Tiny", folder), store, UnsupportedModelError)
    assert "config.json" in sentence and "hidden_size" in sentence and "publishing" not in sentence
    assert not sentence.rstrip().endswith(":")


def test_a_tokenizer_of_another_model(folder: Path, store: Store) -> None:
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(1001)}, unk_token="w0"))  # no password
    (folder / "tokenizer.json").write_text(words.to_str())
    sentence = refusal(Recipe("Tiny", folder), store, ArtifactError)
    assert sentence.startswith(f"the tokenizer of {folder} has 1,001 words where the model knows ")
    assert publish(Recipe("Tiny", folder, tokenizer=False), store).model.name == "Tiny"


def test_words_added_to_a_tokenizer_may_be_unknown_to_the_model(folder: Path, store: Store) -> None:
    known = json.loads((folder / "config.json").read_text())["vocab_size"]
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(known)}, unk_token="w0"))
    words.add_special_tokens(["<pad>"])
    (folder / "tokenizer.json").write_text(words.to_str())
    publish(Recipe("m", folder), store)


def test_a_model_that_does_not_say_what_it_knows(folder: Path) -> None:
    """CANINE hashes characters: its tokenizer has a million, and the model no table of them."""
    require_known_words(1_114_112, 0, folder)
