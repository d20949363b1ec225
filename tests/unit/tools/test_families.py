"""``tools/families`` tells exact from refused from wrong: on a few families, and on outcomes made to order."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto import modeling_auto

TOOL = Path(__file__).parents[3] / "tools" / "families_parts"
CORE = {
    "causal:llama": "exact",
    "causal:gemma2": "exact",  # windows
    "causal:whisper": "exact",  # a decoder alone
    "causal:mixtral": "exact",  # a mixture of experts
    "causal:mamba": "exact",  # a state space
    "causal:jamba": "exact",  # a hybrid
    "causal:zamba": "exact",  # shared layers
    "causal:gemma3n_text": "exact",  # inputs and states per layer
    "causal:xlnet": "exact",  # replays its text
    "masked:bert": "exact",
    "masked:xlm": "exact",  # layers in parallel lists
    "masked:reformer": "refused",
    "seq2seq:t5": "exact",
    "seq2seq:bart": "exact",
    "causal:musicgen": "unbuildable",
}
"""One of each kind, and how it ends."""
DRAWN, SEED = 8, 20
"""How many families are tried besides, and what draws them: another number, other families."""


def drawn() -> list[str]:
    """Rows that nobody picked."""
    mappings = {
        "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    every = sorted(f"{kind}:{name}" for kind, mapping in mappings.items() for name in mapping)
    return random.Random(SEED).sample([name for name in every if name not in CORE], DRAWN)


def run(program: list[str]) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOOL)}
    done = subprocess.run([sys.executable, *program], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(run([str(TOOL), "--json", "--only", ",".join([*CORE, *drawn()])]))
    return answer


def test_each_family_ends_as_it_should(found: dict[str, Any]) -> None:
    rows = {f"{row['kind']}:{row['name']}": row for row in found["rows"]}
    assert rows.keys() == {*CORE, *drawn()}
    assert {name: rows[name]["outcome"] for name in CORE} == CORE
    for name, row in rows.items():
        assert bool(row["reason"]) == (row["outcome"] != "exact"), name
    counted = [row["outcome"] for row in rows.values()]
    for outcome in ("exact", "refused", "wrong", "unbuildable"):
        assert found[outcome] == counted.count(outcome)


def test_none_of_those_drawn_by_lot_is_silently_wrong(found: dict[str, Any]) -> None:
    rows = {f"{row['kind']}:{row['name']}": row for row in found["rows"]}
    assert {name: rows[name]["reason"] for name in drawn() if rows[name]["outcome"] == "wrong"} == {}
    assert sum(rows[name]["outcome"] == "exact" for name in drawn()) >= DRAWN // 2


def test_exact_means_that_everything_was_compared(found: dict[str, Any]) -> None:
    checks = {f"{row['kind']}:{row['name']}": set(row["checks"]) for row in found["rows"]}
    assert checks["causal:llama"] == {"prefill", "greedy", "padded", "chunked"}
    assert checks["causal:gemma2"] == {"prefill", "greedy", "padded", "window", "chunked"}
    assert checks["causal:mamba"] == {"prefill", "greedy", "padded"}  # takes a prompt whole only
    assert checks["masked:bert"] == {"prefill", "padded"}
    assert checks["seq2seq:t5"] == {"prefill", "greedy", "padded"}


BROKEN = """
import json, sys
from dataclasses import asdict
import torch
import check, parts, sweep

def scaled(*given, real=parts.thirds):
    sides = real(*given)
    head = sides[-1][-1]._model.lm_head
    with torch.no_grad():
        head.weight = torch.nn.Parameter(head.weight * 1.001)
    return sides

def crash(*given):
    __import__("os").abort()

def hang(*given):
    __import__("time").sleep(600)

rows = []
for replacement in (scaled, crash, hang):
    check.thirds = replacement
    sweep.SECONDS = 4 if replacement is hang else 60
    rows += [asdict(row) for row in sweep.rows([("causal", "llama", "LlamaForCausalLM")])]
print(json.dumps(rows))
"""


def test_what_differs_crashes_or_hangs_is_wrong() -> None:
    differs, crashed, hung = json.loads(run(["-c", BROKEN]))
    assert {row["outcome"] for row in (differs, crashed, hung)} == {"wrong"}
    assert "prefill: differ by" in differs["reason"] and "logits differ by" in differs["checks"]["greedy"]
    assert "crashed" in crashed["reason"]
    assert "longer than 4 s" in hung["reason"]


def test_a_name_that_nothing_has() -> None:
    command = [sys.executable, str(TOOL), "--only", "no-such-thing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "no-such-thing" in done.stderr
