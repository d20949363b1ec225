"""The reference of `decode`: transformers' generate in one process, driven by lines of JSON on standard input."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer


class Clock(BaseStreamer):
    """Notes when each token is there; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def main() -> None:
    gguf, dtype, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(threads)
    kind = {"F32": torch.float32, "BF16": torch.bfloat16}[dtype]
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=kind).eval()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        ids = tokenizer(task["prompt"], return_tensors="pt").input_ids
        clock = Clock()
        started = time.perf_counter()
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=task["tokens"],
            min_new_tokens=task["tokens"],
            do_sample=False,
            repetition_penalty=1.0,
            streamer=clock,
        )
        first, last = clock.times[1], clock.times[-1]
        tokens = whole[0, ids.shape[1] :].tolist()
        print(
            json.dumps(
                {
                    "tokens_per_second": (len(tokens) - 1) / (last - first),
                    "time_to_first_token_s": first - started,
                    "tokens": tokens,
                }
            ),
            flush=True,
        )


main()
