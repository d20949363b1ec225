"""Going back, starting over and reordering, for every kind of state: each against a fresh run of the same steps."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers.cache_utils import DummyLayer

from tests.unit.compute.checkpoints import MASKED, SEQ2SEQ, Blocks, Chain, cut
from tests.unit.compute.kinds import KINDS, WINDOW, ids
from torrentlm.compute.cache import SNAPSHOTS
from torrentlm.compute.split import Hints
from torrentlm.errors import RefusedError

TRIMMED, WINDOWED, STEPWISE = ["plain", "experts"], ["windows", "shared states"], ["state space", "shared modules"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads share a product's rows out, so with several a row's place in the batch decides how it is rounded."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Blocks]:
    """The block files of a kind of model, written once."""
    known: dict[str, Blocks] = {}

    def get(name: str) -> Blocks:
        if name not in known:
            hints = Hints(replay=name == "replayed")
            kind = KINDS["plain" if name == "replayed" else name]
            known[name] = cut(kind.build(), tmp_path_factory.mktemp("blocks"), hints)
        return known[name]

    return get


class Told(Chain):
    """A chain that remembers which steps lie behind its state."""

    steps: tuple[torch.Tensor, ...] = ()

    def step(self, given: torch.Tensor, *more: object) -> torch.Tensor:
        self.steps = (*self.steps, given)
        return super().step(given)

    def back(self, count: int) -> None:
        """Undo the last ``count`` steps."""
        kept = self.steps[: len(self.steps) - count]
        self.trim(sum(step.shape[1] for step in kept))
        self.steps = kept


def fresh(chain: Told, given: torch.Tensor, pads: tuple[int, ...]) -> torch.Tensor:
    other = Chain(chain.runners, chain.caches[0].batch, 64, pads)
    for step in chain.steps:
        other.step(step)
    return other.step(given)


@pytest.mark.parametrize("pads", [(0, 0), (2, 0)], ids=["even", "padded"])
@pytest.mark.parametrize("name", [*TRIMMED, *WINDOWED, *STEPWISE, "replayed"])
def test_steps_that_are_undone_leave_nothing_behind(
    name: str, pads: tuple[int, int], made: Callable[[str], Blocks]
) -> None:
    chain = Told(made(name).thirds(), 2, 64, pads)
    dice = random.Random(7)
    for sizes, undone in (((4, 1, 3), 2), ((2,), 1), ((1, 1, 1), 3), ((5, 2), 1), ((1,), 0)):
        for size in sizes:
            single = name in STEPWISE and chain.steps
            chain.step(ids(2, 1 if single else size, dice.randrange(1000)))
        chain.back(undone)
        following = ids(2, 1, dice.randrange(1000))
        expected = fresh(chain, following, pads)
        assert torch.equal(chain.step(following), expected)
        assert {cache.length for cache in chain.caches} == {sum(step.shape[1] for step in chain.steps)}


@pytest.mark.parametrize("name", [*TRIMMED, *WINDOWED, *STEPWISE, "replayed"])
def test_the_beginning_can_always_be_gone_back_to(name: str, made: Callable[[str], Blocks]) -> None:
    chain = Told(made(name).thirds(), 1, 64)
    chain.trim(0)
    for size in (WINDOW + 3, 1, 1, 1, 1, 1, 1):
        chain.step(ids(1, size, size))
    chain.back(len(chain.steps))
    given = ids(1, WINDOW + 3, 9)
    assert torch.equal(chain.step(given), fresh(Told(chain.runners, 1, 64), given, (0,)))


@pytest.mark.parametrize("name", [*WINDOWED, *STEPWISE])
def test_too_far_back_is_refused_and_the_session_goes_on(name: str, made: Callable[[str], Blocks]) -> None:
    chain = Told(made(name).thirds(), 1, 64)
    first = WINDOW + 3
    for size in (first, *[1] * (SNAPSHOTS + 1)):
        chain.step(ids(1, size, size))
    length = first + SNAPSHOTS + 1
    for elsewhere in (first, 7):  # a step's end that is forgotten by now, and no step's end
        with pytest.raises(RefusedError) as refused:
            chain.trim(elsewhere)
        assert refused.value.code == "bad_request"
    assert chain.caches[0].length == length
    chain.back(SNAPSHOTS)  # as far as it goes
    given = ids(1, 1, 4)
    expected = fresh(chain, given, (0,))
    assert torch.equal(chain.step(given), expected)


@pytest.mark.parametrize("name", TRIMMED)
def test_plain_attention_can_be_cut_within_a_step(name: str, made: Callable[[str], Blocks]) -> None:
    chain, other = (Chain(made(name).thirds(), 1, 64) for _ in range(2))
    text, given = ids(1, 9, 1), ids(1, 2, 2)
    chain.step(text)
    chain.trim(4)
    other.step(text[:, :4])
    torch.testing.assert_close(chain.step(given), other.step(given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pads", [(0, 0, 0), (3, 0, 1)], ids=["even", "padded"])
@pytest.mark.parametrize("name", [*TRIMMED, *WINDOWED, *STEPWISE, "replayed"])
def test_reordered_rows_go_on_as_the_rows_they_were(
    name: str, pads: tuple[int, ...], made: Callable[[str], Blocks]
) -> None:
    rows = [2, 0, 2]
    runners = made(name).thirds()
    chain, other = Chain(runners, 3, 64, pads), Chain(runners, 3, 64, tuple(pads[row] for row in rows))
    chain.reorder([0, 1, 2])  # nothing to reorder yet
    for size in (WINDOW + 2, 1):
        given = ids(3, size, size)
        chain.step(given)
        other.step(given[rows])
    chain.reorder(rows)
    given = ids(3, 1, 8)
    torch.testing.assert_close(chain.step(given), other.step(given), rtol=1e-5, atol=1e-5)
    chain.trim(0)
    other.trim(0)
    assert torch.equal(chain.step(given), other.step(given))


def test_reordering_again_and_going_back_over_it(made: Callable[[str], Blocks]) -> None:
    """Beam search: what could be undone before belongs to other rows now, so it is gone where states are snapshots."""
    chain = Chain(made("state space").thirds(), 2, 64)
    for size in (3, 1, 1):
        chain.step(ids(2, size, size))
    chain.reorder([1, 0])
    with pytest.raises(RefusedError):
        chain.trim(4)
    chain.step(ids(2, 1, 1))
    chain.trim(5)
    assert chain.caches[0].length == 5


@pytest.mark.parametrize("name", sorted(set(KINDS) - {"two sides"}))
def test_a_full_session_takes_no_more_than_was_said(name: str, made: Callable[[str], Blocks]) -> None:
    kind = KINDS[name]
    assert kind.auto is not SEQ2SEQ
    chain = Chain(made(name).thirds(), 2, 40)
    for size in (38, 1, 1) if kind.auto is not MASKED else (40,):
        chain.step(ids(2, size, size))
    for runner, cache in zip(chain.runners, chain.caches, strict=True):
        states = cache.layered
        own = [] if states is None else [layer for layer in states._own if not isinstance(layer, DummyLayer)]
        held = sum(bytes_of(layer) for layer in own)
        kept = [entry for _, entries in states._snapshots for layer, entry in entries if layer in own] if own else []
        said = runner.cache_bytes(2, 40)
        assert held + sum(map(bytes_of, kept)) <= said
        assert said <= 2 * (held + sum(map(bytes_of, kept))) + 8 * 2 * 40


def bytes_of(layer: object) -> int:
    values = layer if isinstance(layer, dict) else vars(layer)
    found = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for value in values.values()
        for tensor in (value.values() if isinstance(value, dict) else [value])
        if isinstance(tensor, torch.Tensor)
    }
    return sum(found.values())


def test_what_replays_keeps_ids_at_the_stem_and_nothing_elsewhere(made: Callable[[str], Blocks]) -> None:
    blocks = made("replayed")
    assert blocks.split.replays and blocks.split.rewind(range(6)) == "replay"
    chain = Chain(blocks.thirds(), 2, 32)
    chain.step(ids(2, 5, 1))
    chain.step(ids(2, 1, 2))
    assert [cache.states for cache in chain.caches] == [None] * 3
    assert [None if cache.ids is None else tuple(cache.ids.shape) for cache in chain.caches] == [(2, 6), None, None]
    assert [runner.cache_bytes(2, 32) for runner in chain.runners] == [2 * 32 * 8, 0, 0]


def test_replaying_is_the_whole_model(tmp_path: Path) -> None:
    model = KINDS["plain"].build()
    chain = Chain(cut(model, tmp_path, Hints(replay=True)).thirds(), 1, 64)
    text = ids(1, 9, 3)
    for stop in (5, 6, 9):
        found = chain.step(text[:, chain.caches[0].length : stop])
        with torch.no_grad():
            assert torch.equal(found, model(input_ids=text[:, :stop], use_cache=False, logits_to_keep=1).logits)
