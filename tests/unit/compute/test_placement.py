"""Everything of a span is on its device: run on one that has no memory and computes only shapes.

torch's fake tensors refuse operations between devices, as a real accelerator does, so no GPU is needed to see what was
left behind on the processor. The device is registered for good, so all of it happens in another process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 256},
    "gpt_neox": {},
    "bloom": {},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "mamba": {"state_size": 16, "time_step_rank": 8},
}
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration
from tests.unit.compute.checkpoints import cut, tiny
from torrentlm.compute.sizes import Point
from torrentlm.errors import TorrentLMError

backend_registration._setup_privateuseone_for_python_backend("elsewhere")
plain_to, plain_tensor = torch.Tensor.to, torch.tensor

def to(self, *given, **named):
    if "elsewhere" in f"{given}{named}":
        self = self if isinstance(self, FakeTensor) else fakes.from_tensor(self)
        self.constant = None  # a known value would really be copied
    return plain_to(self, *given, **named)

def tensor(data, *given, device=None, **named):
    made = plain_tensor(data, *given, **named)
    return made if device is None else made.to(device)

def placed(blocks):
    runner = blocks.runner(1, 3, device="elsewhere")
    cache = runner.open(1, 64, (2,))
    found = []
    for tokens in (5, 1):
        given = runner.split.borders[1].zeros(Point(1, tokens), torch.float32, runner.device)
        made = runner.forward(cache, given, tokens)
        found += [f"{each.device.type} {list(each.shape)}" for each in made.tensors]
    return found, sorted({kept.device.type for kept in [*runner._model.buffers(), *runner._model.parameters()]})

torch.Tensor.to, torch.tensor = to, tensor
found = {}
for family, settings in json.loads(sys.argv[1]).items():
    (folder := Path(sys.argv[2], family)).mkdir()
    blocks = cut(tiny(family, **settings), folder)
    try:
        with (fakes := FakeTensorMode(allow_non_fake_inputs=True)):
            found[family] = placed(blocks)
    except (RuntimeError, TorrentLMError) as error:
        found[family] = str(error)[:500]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    command = [sys.executable, "-c", SCRIPT, json.dumps(FAMILIES), str(tmp_path_factory.mktemp("blocks"))]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stderr[-2000:]
    answer: dict[str, Any] = json.loads(run.stdout)
    return answer


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_stays_on_the_processor(family: str, found: dict[str, Any]) -> None:
    assert found[family] == [["elsewhere [1, 5, 32]", "elsewhere [1, 1, 32]"], ["elsewhere"]]
