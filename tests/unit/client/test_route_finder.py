"""What is said when there is no route."""

from __future__ import annotations

from torrentlm.client.route_finder import missing_sentence
from torrentlm.manifest.manifest import BlockEntry, Manifest, Side
from torrentlm.records import Endpoint, NodeKey, Span
from torrentlm.route.plan import Missing
from torrentlm.route.registry import Candidate, Snapshot

BLOCKS = (BlockEntry("stem", None, ()), BlockEntry("layers", Span(0, 0), ()), BlockEntry("head", None, ()))
MANIFEST = Manifest("Tiny", "Any", "F32", (Side("h", 1),), BLOCKS, (), ())


def test_it_says_whether_a_holder_or_its_consent_is_missing() -> None:
    peer = Candidate(NodeKey(b"k" * 32), Endpoint("10.0.0.1", 1), (Span(0, 1),))
    snapshot = Snapshot((peer,), known=1, answered=1)
    consent = missing_sentence(MANIFEST, Missing(1), snapshot, {1, 2})
    assert consent.startswith("no peer that holds block 1 (layer 0) applies adapters") and "--adapters" in consent
    for block, adapted in ((1, frozenset[int]()), (2, frozenset({1, 2}))):
        assert missing_sentence(MANIFEST, Missing(block), snapshot, adapted).startswith(f"no peer holds block {block}")
