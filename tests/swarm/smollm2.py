"""SmolLM2-135M-Instruct, twice: as three holder processes, and as transformers has it in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import torrentlm
from tests.e2e.processes import Seed
from torrentlm.config import load
from torrentlm.publish.source import locate

RECIPE = Path(__file__).parents[2] / "torrents" / "smollm2-135m-instruct.toml"
SPANS = ("0-10", "11-20", "21-31")


@dataclass
class Swarm:
    """``holders`` and what each said when it was ready; the publisher is gone."""

    magnet: str
    folder: Path
    holders: list[Seed]
    ready: list[dict[str, Any]]

    def connect(self) -> torrentlm.Model:
        return torrentlm.connect(self.magnet, data=self.folder / "client", port=0, dht_bootstrap=["none"])


@contextmanager
def three_holders(folder: Path) -> Iterator[Swarm]:
    """A publisher, then three holders that start with empty folders and nothing but its magnet; then no publisher."""
    with ExitStack() as stack:
        publisher = stack.enter_context(Seed(str(RECIPE), folder / "publisher", "--blocks", "none"))
        magnet = publisher.wait_for("ready", 300)["magnet"]
        holders = [
            stack.enter_context(Seed(magnet, folder / f"holder-{number}", "--blocks", span))
            for number, span in enumerate(SPANS)
        ]
        ready = [holder.wait_for("ready", 300) for holder in holders]
        assert publisher.end() == 0
        yield Swarm(ready[0]["magnet"], folder, holders, ready)


@dataclass
class Reference:
    """transformers' own loading of the same GGUF file, fp32, eager to the last detail of its defaults."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def ids(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer(text)["input_ids"]]

    def greedy(self, prompt: str, count: int) -> list[int]:
        ids = torch.tensor([self.ids(prompt)])
        whole = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, repetition_penalty=1.0
        )
        return whole[0, ids.shape[1] :].tolist()

    def logits(self, rows: list[list[int]]) -> torch.Tensor:
        with torch.inference_mode():
            return self.model(torch.tensor(rows)).logits


def load_reference() -> Reference:
    path = locate(load(RECIPE).recipe).path  # type: ignore[arg-type]
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    return Reference(model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name))
