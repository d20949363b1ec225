"""A model with code of its own, as operators meet it: refused, allowed on each node by itself, then like any other."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from tests.e2e import checkpoint
from tests.e2e.processes import Seed, run
from tests.unit.compute import custom_models

PROMPT = "The swarm hums"


def test_each_operator_allows_it_by_hash(tmp_path: Path) -> None:
    plain = checkpoint.make(tmp_path / "plain")
    source = tmp_path / "own"
    whole = custom_models.save(source, vocabulary=256)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(plain / name, source / name)
    recipe = tmp_path / "model.toml"
    text = f'[model]\nname = "Own"\n\n[model.source]\nfolder = "{source}"\n'
    recipe.write_text(text)

    refused = run("seed", str(recipe), "--data", str(tmp_path / "p"), "--host", "127.0.0.1", "--port", "0")
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    found = re.search(r'allow_code = \["([0-9a-f]{64})"\]', refused.stderr)
    assert found is not None, refused.stderr

    recipe.write_text(text + f'\n[node]\nallow_code = ["{found[1]}"]\n')
    with Seed(str(recipe), tmp_path / "p", "--blocks", "0-2") as publisher:
        magnet = publisher.wait_for("ready")["magnet"]
        with Seed(magnet, tmp_path / "no", "--blocks", "3-5") as careful:
            assert careful.process.wait(60) == 1
            assert found[1] in careful.errors and careful.errors.count("\n") == 1
            assert not list((tmp_path / "no" / "blocks").glob("*.safetensors"))  # refused before anything is fetched
        with Seed(magnet, tmp_path / "yes", "--blocks", "3-5", "--allow-code", found[1]) as holder:
            holder.wait_for("ready")
            client = ("--data", str(tmp_path / "client"), "--dht-bootstrap", "none")
            answer = run("generate", magnet, "--prompt", PROMPT, "--max-new-tokens", "16", "--json", *client)
            assert answer.returncode == 0, answer.stderr
    ids = PreTrainedTokenizerFast.from_pretrained(source)(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = whole.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    assert json.loads(answer.stdout)["tokens"] == expected[0, ids.shape[1] :].tolist()
    assert len(json.loads(answer.stdout)["route"]) == 2
