"""``tools/quality``: a table of what each precision costs; ``--write`` puts it into docs/precision.md."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from measure import Row, rows
from model import demo, off_the_grid
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "tests" / "texts" / "alice.txt"
DOCUMENT = ROOT / "docs" / "precision.md"
PROMPT = "Once upon a time, in a small village by the sea, there lived"
BEGIN, END = "<!-- tools/quality {name} -->\n", "<!-- end -->"


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/quality", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/precision.md")
    parser.add_argument("--only", choices=("published", "moved"), help="one of the two models")
    parser.add_argument("--threads", type=int, default=0, help="compute threads (default: all cores)")
    parser.add_argument(
        "--data", type=Path, help="where the published models stay for the next time (default: nowhere)"
    )
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    found: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory(prefix="torrentlm-quality-") as folder:
        data = given.data or Path(folder)
        first = demo(data)
        cache = data / "quantized"
        tokenizer = AutoTokenizer.from_pretrained(first.published.folder)
        text, prompt = (
            torch.tensor(tokenizer(words)["input_ids"]) for words in (TEXT.read_text(encoding="utf-8"), PROMPT)
        )
        if given.only != "moved":
            found["published"] = rows(first, text, prompt, cache)
        if given.only != "published":
            found["moved"] = rows(off_the_grid(data), text, prompt, cache)
    for name, lines in found.items():
        if given.write:
            _write(name, table(lines))
        if not given.json:
            print(f"{name}:\n\n{table(lines)}")
    if given.json:
        described = {name: [line.described() for line in lines] for name, lines in found.items()}
        print(json.dumps({"tokens": len(text), **described}))
    return 0


def table(lines: list[Row]) -> str:
    head = "| precision | perplexity | KL to F32 | greedy agreement | weights | tokens/s |\n"
    return f"{head}{'| --- ' * 6}|\n" + "".join(
        f"| {line.name} | {line.perplexity:.3f} | {line.kl:.5f} | {line.agreement:.1%} | {line.bytes / 1e6:.0f} MB"
        f" | {line.tokens_per_second:.0f} |\n"
        for line in lines
    )


def _write(name: str, made: str) -> None:
    content = DOCUMENT.read_text(encoding="utf-8")
    before, begin, rest = content.partition(BEGIN.format(name=name))
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{DOCUMENT} has no place for the table {name}")
    DOCUMENT.write_text(f"{before}{begin}{made}{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
