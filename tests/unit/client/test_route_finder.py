"""What is said when there is no route."""

from __future__ import annotations

from tests.unit.node.test_describe import manifest
from torrentlm.client.route_finder import missing_sentence
from torrentlm.records import Endpoint, NodeKey, Span
from torrentlm.route.plan import Missing
from torrentlm.route.registry import Candidate, Snapshot


def test_it_says_whether_a_holder_or_its_consent_is_missing() -> None:
    peer = Candidate(NodeKey(b"k" * 32), Endpoint("10.0.0.1", 1), (Span(0, 1),))
    snapshot = Snapshot((peer,), known=1, answered=1)
    consent = missing_sentence(manifest(), Missing(1), snapshot, {1, 2})
    assert consent.startswith("no peer that holds block 1 (layer 0) applies adapters") and "--adapters" in consent
    for block, adapted in ((1, frozenset[int]()), (2, frozenset({1, 2}))):
        assert missing_sentence(manifest(), Missing(block), snapshot, adapted).startswith(
            f"no peer holds block {block}"
        )
