"""docs/protocol.md says what the code does: its tables and its worked example are made here and compared.

``python -m pytest tests/unit/wire/test_protocol_doc.py`` with ``REWRITE_DOCS=1`` in the environment writes them anew.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from torrentlm.records import SessionId
from torrentlm.wire import frames
from torrentlm.wire.frames import Hello, decode_frame
from torrentlm.wire.handshake import CarrierHandshake
from torrentlm.wire.kinds import Array, Kind, Optional, Struct
from torrentlm.wire.messages import FAIL_CODES, SCHEMA, Step, Want
from torrentlm.wire.pipe import MAX_CONTROL_BACKLOG, PipeCore
from torrentlm.wire.streams import Limits
from torrentlm.wire.tensors import ITEM_SIZES, MAX_EXPANDED, Tensor

from .nodes import INFO_HASH, Node, verify

DOCUMENT = Path(__file__).parents[3] / "docs" / "protocol.md"


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def fields(record: Struct) -> str:
    return "; ".join(f"`{name}` {str(kind).replace('|', 'or')}" for name, kind in record.fields)


def dtypes() -> str:
    rows = ((str(number), name, str(size)) for number, (name, size) in enumerate(ITEM_SIZES.items()))
    return table(("number", "dtype", "bytes each"), rows)


def messages() -> str:
    rows = ((str(code), record.__name__, fields(SCHEMA.structs[record])) for code, record in SCHEMA.messages.items())
    return table(("code", "message", "fields"), rows)


def structs() -> str:
    def within(kind: Kind) -> Iterator[Struct]:
        match kind:
            case Optional(inner) | Array(inner, _):
                yield from within(inner)
            case Struct():
                yield kind
                for _, inner in kind.fields:
                    yield from within(inner)

    found = {struct.record.__name__: struct for record in SCHEMA.structs.values() for struct in within(record)}
    for record in SCHEMA.structs:
        del found[record.__name__]
    return table(("record", "fields"), ((name, fields(found[name])) for name in sorted(found)))


def example() -> str:
    """A handshake, one step and its acknowledgement, between two real cores."""
    nodes = Node(1), Node(2)
    session = SessionId(bytes.fromhex("5e" * 16))
    hellos = [
        Hello(node.node, nonce * 32, instance, port, "torrentlm/0.1.0")
        for node, nonce, instance, port in (
            (nodes[0], b"\xaa", b"instancA", 6881),
            (nodes[1], b"\xbb", b"instancB", 6882),
        )
    ]
    carriers = [
        CarrierHandshake(
            hello,
            dialer=number == 0,
            info_hash=INFO_HASH,
            sign=nodes[number].key.sign,
            verify=verify,
            generation=lambda _: 0,
        )
        for number, hello in enumerate(hellos)
    ]
    lines: list[str] = []

    def show(sender: int, frame: bytes | None) -> bytes:
        assert frame is not None
        name = type(decode_frame(frame)).__name__.upper()
        arrow = "A → B" if sender == 0 else "B → A"
        lines.append(f"{arrow}  {name}, {len(frame)} bytes")
        lines.extend(f"    {frame[start : start + 32].hex(' ')}" for start in range(0, len(frame), 32))
        return frame

    for _ in ("HELLO", "PROOF"):
        shown = [show(sender, carriers[sender].next_frame()) for sender in (0, 1)]
        for sender in (0, 1):
            carriers[1 - sender].receive_frame(shown[sender])
    cores = []
    for number, carrier in enumerate(carriers):
        assert carrier.result is not None
        cores.append(PipeCore(nodes[number].node, carrier.result))
        cores[number].carrier_opened(0)
    leader = 0 if cores[0].leader else 1
    assert leader == 1, "the document says that B leads"
    cores[0].receive_frame(0, show(1, cores[1].next_frame(0)))
    values = Tensor("F32", (1, 1, 4), struct.pack("<4f", 1, 2, 3, 4))
    cores[0].send(Step(session, 3, 17, 16, Want.SAMPLE, None, (values,), 2), 2)
    [event] = cores[1].receive_frame(0, show(0, cores[0].next_frame(0)))
    cores[1].consumed(event)
    cores[1].flush_ack()
    cores[0].receive_frame(0, show(1, cores[1].next_frame(0)))
    return "```\n" + "\n".join(lines) + "\n```\n"


@pytest.mark.parametrize("section", [dtypes, messages, structs, example], ids=lambda section: section.__name__)
def test_the_document_shows_what_the_code_does(section: Callable[[], str]) -> None:
    text = DOCUMENT.read_text()
    begin, end = f"<!-- {section.__name__} -->\n", "<!-- end -->"
    before, rest = text.split(begin)
    stands, after = rest.split(end, 1)
    if os.environ.get("REWRITE_DOCS"):
        stands = section()
        DOCUMENT.write_text(f"{before}{begin}{stands}{end}{after}")
    assert stands == section()


def test_the_documents_numbers_are_the_codes() -> None:
    text = DOCUMENT.read_text()
    limits = Limits()
    for number in (
        f"{frames.MAX_FRAME:,} bytes",
        f"wire version {frames.WIRE_VERSION}",
        f"at most {frames.MAX_HELLO} bytes",
        f"{limits.message:,}",
        f"{limits.ack_frames} frames or {limits.ack_bytes >> 10} KiB",
        f"{limits.unacked >> 20} MiB",
        f"begins with {limits.window >> 20} MiB of credit",
        f"longer than {limits.window >> 11} KiB is *large*",
        f"this implementation: {limits.reserve >> 20} MiB",
        f"{MAX_EXPANDED >> 10} KiB together",
        f"from 0 to {frames.MAX_STREAMS - 1}",
        f"| {MAX_CONTROL_BACKLOG}; more PINGs",
        *(f"| `{code}` |" for code in FAIL_CODES),
        *(f"| {kind.value} | {kind.name} |" for kind in frames.FrameType),
    ):
        assert number in text, number
