"""The recipe in torrents/, published for real: the promised magnet, the right weights, little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from torrentlm.config import Recipe, load
from torrentlm.manifest.manifest import FILE_NAME, Manifest
from torrentlm.publish.source import locate

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "torrents" / "smollm2-135m-instruct.toml"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("smollm2") / "data"


@pytest.fixture(scope="module")
def report(data: Path) -> dict[str, Any]:
    """What a process of its own said about publishing the model twice."""
    command = [sys.executable, "-m", "tests.unit.publish.measured", str(RECIPE), str(data)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def gguf() -> dict[str, Any]:
    """Arguments that make transformers load the same file itself."""
    recipe = load(RECIPE).recipe
    assert isinstance(recipe, Recipe)
    path = locate(recipe).path
    return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}


def test_magnet_is_the_committed_one(report: dict[str, Any]) -> None:
    assert report["magnet"] == RECIPE.with_suffix(".magnet").read_text().strip()


def test_second_run_is_immediate(report: dict[str, Any]) -> None:
    assert report["seconds"][1] < 2


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="PSS is read from Linux's /proc")
def test_peak_memory(report: dict[str, Any]) -> None:
    assert report["peak"] - report["idle"] < 2 * report["largest_block"] + 500_000_000


def test_every_tensor_equals_transformers(report: dict[str, Any], data: Path, gguf: dict[str, Any]) -> None:
    expected = AutoModelForCausalLM.from_pretrained(**gguf, dtype=torch.float32).state_dict()
    manifest = Manifest.from_bytes((Path(report["folder"]) / FILE_NAME).read_bytes())
    seen = set()
    for block in manifest.blocks:
        for used in block.files:
            with safe_open(data / "blocks" / manifest.files[used.file].name, "pt") as file:
                for name in file.keys():  # noqa: SIM118  it is no mapping
                    full_name = used.full_name(name)
                    assert torch.equal(file.get_tensor(name), expected[full_name]), full_name
                    seen.add(full_name)
    assert expected.keys() - seen == {"lm_head.weight"}  # tied


def test_config_and_tokenizer_equal_transformers(report: dict[str, Any], gguf: dict[str, Any]) -> None:
    ours, theirs = AutoConfig.from_pretrained(report["folder"]), AutoConfig.from_pretrained(**gguf)
    said_by_us = {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    dropped = {"_name_or_path", "_model_name_or_path"}
    for key in (ours.to_dict().keys() | theirs.to_dict().keys()) - dropped:
        assert ours.to_dict().get(key) == said_by_us.get(key, theirs.to_dict().get(key)), key
    tokenizer, reference = AutoTokenizer.from_pretrained(report["folder"]), AutoTokenizer.from_pretrained(**gguf)
    assert tokenizer.get_vocab() == reference.get_vocab()
    assert tokenizer.special_tokens_map == reference.special_tokens_map
    for text in ("Why is the sky blue?", "  ünïcode 北京 🙂\n\t123 <|im_end|>", ""):
        assert tokenizer(text).input_ids == reference(text).input_ids
    chat = [{"role": "user", "content": "Hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == reference.apply_chat_template(chat, tokenize=False)


def test_nothing_of_this_machine_is_published(report: dict[str, Any], gguf: dict[str, Any]) -> None:
    here = [str(gguf["pretrained_model_name_or_path"]), str(Path.home()), "transformers_version", "site-packages"]
    for path in Path(report["folder"]).iterdir():
        if path.suffix in (".json", ".jinja"):
            text = path.read_text()
            assert not [word for word in here if word in text and word != "/"], path.name
