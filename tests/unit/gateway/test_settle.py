from __future__ import annotations

import pytest

from torrentlm.gateway.settle import Candidate, surplus
from torrentlm.records import InfoHash

A, B = InfoHash(b"a" * 20), InfoHash(b"b" * 20)


@pytest.mark.parametrize(
    ("candidates", "closed"),
    [
        ([], set()),
        ([Candidate(1, A, attached=True, dialed=False)], set()),
        ([Candidate(1, A, attached=False, dialed=False)], set()),
        # one per torrent in transfer
        ([Candidate(1, A, attached=True, dialed=True), Candidate(2, B, attached=True, dialed=True)], set()),
        # of two for one torrent, the leader's dial stays, though it is younger
        ([Candidate(1, A, attached=True, dialed=False), Candidate(2, A, attached=True, dialed=True)], {1}),
        # of two equal ones the older
        ([Candidate(1, A, attached=True, dialed=False), Candidate(2, A, attached=True, dialed=False)], {2}),
        # one for the pipe alone is not needed beside another
        ([Candidate(1, A, attached=False, dialed=True), Candidate(2, B, attached=True, dialed=False)], {1}),
        # of those for the pipe alone one stays, whatever their torrents
        ([Candidate(1, A, attached=False, dialed=False), Candidate(2, B, attached=False, dialed=True)], {1}),
    ],
)
def test_surplus(candidates: list[Candidate], closed: set[int]) -> None:
    assert surplus(candidates) == closed
