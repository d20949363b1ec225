from __future__ import annotations

import random
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from torrentlm.errors import LocalProtocolError, RemoteProtocolError
from torrentlm.records import SessionId
from torrentlm.wire import frames
from torrentlm.wire.frames import (
    Ack,
    Bye,
    ByeCode,
    Credit,
    Data,
    Ping,
    Reset,
    Select,
    decode_frame,
    encode_data,
    encode_frame,
)
from torrentlm.wire.messages import Halt, Message, Output, encode_message
from torrentlm.wire.pipe import MAX_CONTROL_BACKLOG, MessageReceived, PeerClosed, PongReceived
from torrentlm.wire.streams import Limits
from torrentlm.wire.tensors import Tensor

from .pipes import FOLLOWER, LEADER, SMALL, Pair, connected
from .strategies import messages

SESSION = SessionId(bytes(16))
SIDES = st.sampled_from((LEADER, FOLLOWER))
CHOICES = st.integers(0, 3)


def output(size: int, epoch: int = 0) -> Output:
    """A message of a little more than ``size`` bytes, unlike every other epoch's."""
    return Output(SESSION, epoch, 0, (Tensor("I8", (size,), random.Random(epoch).randbytes(size)),))


def sent_frames(pair: Pair, side: int, carrier: int = 0) -> list[frames.Frame]:
    """Everything that a core wants to send on a carrier now, taken away from it."""
    taken = []
    while (frame := pair.cores[side].next_frame(carrier)) is not None:
        taken.append(decode_frame(frame))
    return taken


# -- messages ----------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(messages, st.integers(1, 200))
def test_a_message_is_put_together_from_frames_of_any_size(message: Message, body: int) -> None:
    pair = connected(Limits(body=body))
    pair.cores[LEADER].send(message, 5)
    pair.settle()
    assert pair.received(FOLLOWER) == [(5, message)]


def test_a_small_message_is_put_together_from_frames_of_every_size() -> None:
    message = output(100)
    for body in range(1, encode_message(message).length + 1):
        pair = connected(Limits(body=body))
        pair.cores[LEADER].send(message)
        pair.settle()
        assert pair.received(FOLLOWER) == [(0, message)]


def test_events_do_not_refer_to_the_receive_buffer() -> None:
    pair = connected()
    pair.cores[LEADER].send(output(1000))
    frame = bytearray(pair.cores[LEADER].next_frame(0) or b"")
    [event] = pair.cores[FOLLOWER].receive_frame(0, frame)
    frame[:] = bytes(len(frame))
    assert isinstance(event, MessageReceived)
    assert event.message == output(1000)


def test_a_decode_step_costs_less_than_100_bytes_beside_its_payload() -> None:
    pair = connected()
    pair.cores[LEADER].send(output(2304), 17)
    frame = pair.cores[LEADER].next_frame(0)
    assert frame is not None
    assert pair.cores[LEADER].next_frame(0) is None
    assert len(frame) + frames.BEP3_OVERHEAD - 2304 < 100


def test_streams_take_turns_frame_by_frame() -> None:
    pair = connected()
    for stream in (3, 1, 2):
        pair.cores[LEADER].send(output(150_000, stream), stream)
    order = [frame.stream for frame in sent_frames(pair, LEADER) if isinstance(frame, Data)]
    assert order == [3, 1, 2] * 3


def test_a_small_message_waits_for_one_frame_of_a_large_one() -> None:
    pair = connected()
    pair.cores[LEADER].send(output(900_000), 1)
    pair.cores[LEADER].next_frame(0)
    pair.cores[LEADER].send(Halt(SESSION, 1), 0)
    large, small = sent_frames(pair, LEADER)[:2]
    assert isinstance(large, Data)
    assert isinstance(small, Data)
    assert (large.stream, small.stream) == (1, 0)


# -- carriers ----------------------------------------------------------------------------------------------------------


def test_the_leader_selects_and_the_follower_sends_nothing_before() -> None:
    pair = Pair()
    pair.cores[FOLLOWER].send(Halt(SESSION, 1))
    pair.open()
    assert sent_frames(pair, FOLLOWER) == []
    assert sent_frames(pair, LEADER) == [Select(1, 0)]
    pair.cores[FOLLOWER].receive_frame(0, encode_frame(Select(1, 0)))
    [data] = sent_frames(pair, FOLLOWER)
    assert isinstance(data, Data)


def test_a_pipe_survives_its_carrier() -> None:
    pair = connected()
    pair.open()
    for epoch in range(10):
        pair.cores[LEADER].send(Halt(SESSION, epoch), 1)
        pair.cores[FOLLOWER].send(Halt(SESSION, epoch), 1)
    for _ in range(5):
        pair.transmit(0, LEADER)
        pair.transmit(0, FOLLOWER)
    for side in (FOLLOWER, LEADER):
        pair.deliver(0, side)
        pair.close(0, side)
    pair.settle()
    expected = [(1, Halt(SESSION, epoch)) for epoch in range(10)]
    assert pair.received(LEADER) == expected
    assert pair.received(FOLLOWER) == expected


def test_the_leader_sends_again_only_what_did_not_arrive() -> None:
    pair = connected()
    for epoch in range(10):
        pair.cores[LEADER].send(Halt(SESSION, epoch))
    while pair.transmit(0, LEADER):
        pass
    for _ in range(7):
        pair.deliver(0, FOLLOWER)
    pair.close(0, FOLLOWER)
    pair.close(0, LEADER)
    number = pair.open()
    assert sent_frames(pair, LEADER, number) == [Select(2, 0)]  # holds the rest until the answer
    pair.cores[FOLLOWER].receive_frame(number, encode_frame(Select(2, 0)))
    assert sent_frames(pair, FOLLOWER, number) == [Ack(7)]
    pair.cores[LEADER].receive_frame(number, encode_frame(Ack(7)))
    again = sent_frames(pair, LEADER, number)
    assert [frame.seq for frame in again if isinstance(frame, Data)] == [7, 8, 9]


def test_a_select_that_a_later_one_overtook_is_passed_over() -> None:
    pair = connected()
    pair.open()
    pair.open()
    for number, serial in ((2, 3), (1, 2)):
        pair.cores[FOLLOWER].receive_frame(number, encode_frame(Select(serial, 0)))
    assert pair.cores[FOLLOWER].active == 2


def test_a_wrapping_sequence_number_is_nothing_special() -> None:
    pair = connected()
    pair.cores[LEADER]._sent.next_seq = pair.cores[FOLLOWER]._receive_seq = 2**32 - 3
    for epoch in range(8):
        pair.cores[LEADER].send(Halt(SESSION, epoch))
        if epoch % 3 == 0:
            pair.cores[FOLLOWER].flush_ack()
        pair.settle()
    pair.cores[FOLLOWER].flush_ack()
    pair.settle()
    assert [message for _, message in pair.received(FOLLOWER)] == [Halt(SESSION, epoch) for epoch in range(8)]
    assert pair.cores[LEADER].idle


def test_acks_come_alone_when_enough_is_unanswered_or_when_asked_for() -> None:
    pair = connected()
    follower = pair.cores[FOLLOWER]
    for epoch in range(64):
        assert sent_frames(pair, FOLLOWER) == []
        pair.cores[LEADER].send(Halt(SESSION, epoch))
        follower.receive_frame(0, pair.cores[LEADER].next_frame(0) or b"")
    assert sent_frames(pair, FOLLOWER) == [Ack(64)]
    pair.cores[LEADER].send(Halt(SESSION, 64))
    follower.receive_frame(0, pair.cores[LEADER].next_frame(0) or b"")
    follower.flush_ack()
    assert sent_frames(pair, FOLLOWER) == [Ack(65)]
    follower.flush_ack()
    assert sent_frames(pair, FOLLOWER) == []


def test_a_peer_that_never_acknowledges_stops_us_at_the_bound() -> None:
    pair = connected(Limits(window=1 << 24, unacked=1 << 20))
    leader = pair.cores[LEADER]
    for _ in range(8):
        leader.send(output(1 << 20))
    sent = sum(len(frame.body) for frame in sent_frames(pair, LEADER) if isinstance(frame, Data))
    assert (1 << 20) - frames.MAX_FRAME <= sent <= (1 << 20) + frames.MAX_FRAME
    assert not leader.has_frames(0)
    leader.receive_frame(0, encode_frame(Ack(3)))
    assert leader.has_frames(0)


def test_ping_is_answered_on_its_own_carrier() -> None:
    pair = connected()
    number = pair.open()
    pair.cores[FOLLOWER].ping(number, b"12345678")
    pair.settle()
    assert pair.events[FOLLOWER] == [PongReceived(number, b"12345678")]


# -- flow control ------------------------------------------------------------------------------------------------------


def test_a_receiver_that_does_not_consume_stalls_only_that_stream() -> None:
    pair = connected(SMALL)
    for epoch in range(4):
        pair.cores[LEADER].send(output(100, epoch), 1)
    pair.settle()
    stalled = len(pair.take(FOLLOWER))
    assert 0 < stalled < 4
    for epoch in range(20):
        pair.cores[LEADER].send(output(100, epoch), 2)
        pair.settle()
        [event] = pair.take(FOLLOWER)
        assert event.stream == 2
        pair.cores[FOLLOWER].consumed(event)
    assert not pair.cores[LEADER].idle


def test_send_refuses_what_the_caller_should_have_waited_with() -> None:
    pair = Pair(SMALL)
    pair.cores[LEADER].send(output(600))
    assert not pair.cores[LEADER].writable(0)
    assert pair.cores[LEADER].writable(1)
    with pytest.raises(LocalProtocolError, match="wait until it is writable"):
        pair.cores[LEADER].send(output(1))


def test_a_message_larger_than_the_window_gets_through_unconsumed() -> None:
    pair = connected(SMALL)
    pair.cores[LEADER].send(output(3900), 1)
    pair.settle()
    assert pair.received(FOLLOWER) == [(1, output(3900))]


def test_large_messages_share_one_reserve_and_none_waits_for_ever() -> None:
    pair = connected(SMALL)  # room for two of these four
    for stream in range(4):
        pair.cores[LEADER].send(output(3900, stream), stream)
    pair.settle()
    first = pair.take(FOLLOWER)
    assert [event.stream for event in first] == [0, 1]
    for event in first:
        pair.cores[FOLLOWER].consumed(event)
    pair.settle()
    assert [event.stream for event in pair.take(FOLLOWER)] == [2, 3]


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3500)), max_size=20), st.integers(1, 40))
def test_any_sizes_get_through_when_everything_is_consumed_in_the_end(sizes: list[tuple[int, int]], every: int) -> None:
    pair = connected(SMALL)
    wanted: dict[int, list[Message]] = defaultdict(list)
    got: dict[int, list[Message]] = defaultdict(list)
    held: list[MessageReceived] = []

    def consume() -> None:
        for event in held:
            pair.cores[FOLLOWER].consumed(event)
        held.clear()

    def settle() -> None:
        pair.settle()
        for event in pair.take(FOLLOWER):
            got[event.stream].append(event.message)
            held.append(event)

    for epoch, (stream, size) in enumerate(sizes):
        while not pair.cores[LEADER].writable(stream):
            consume()
            settle()
        message = output(size, epoch)
        pair.cores[LEADER].send(message, stream)
        wanted[stream].append(message)
        if epoch % every == 0:
            settle()
    for _ in range(len(sizes) + 1):
        consume()
        settle()
    assert got == wanted
    consume()
    assert pair.cores[FOLLOWER]._reserve_left == SMALL.reserve


def test_reset_drops_what_waits_and_what_had_begun() -> None:
    pair = connected(SMALL)
    leader, follower = pair.cores
    for stream in (1, 2):
        leader.send(output(3000, stream), stream)
    for _ in range(6):
        pair.transmit(0, LEADER)
    leader.reset(1)
    leader.send(output(40, 3), 1)
    pair.settle()
    assert sorted(pair.received(FOLLOWER), key=lambda item: item[0]) == [(1, output(40, 3)), (2, output(3000, 2))]
    for event in pair.take(FOLLOWER):
        follower.consumed(event)
    assert follower._reserve_left == SMALL.reserve
    leader.reset(1)  # nothing under way: nothing to say
    pair.settle()
    assert not leader.has_frames(0)


def test_reset_returns_the_credit_of_what_had_come() -> None:
    pair = connected(SMALL)
    for epoch in range(20):
        pair.cores[LEADER].send(output(150, epoch), 1)
        for _ in range(2):
            pair.transmit(0, LEADER)
        pair.cores[LEADER].reset(1)
        pair.settle()
    pair.cores[LEADER].send(output(150, 99), 1)
    pair.settle()
    assert pair.received(FOLLOWER) == [(1, output(150, 99))]


# -- a peer that breaks the rules --------------------------------------------------------------------------------------


def data_frame(
    seq: int, body: bytes, stream: int = 0, *, first: bool = False, end: bool = False, length: int = 0
) -> bytes:
    return encode_data(seq, 0, stream, [memoryview(body)], first=first, end=end, length=length)


@pytest.mark.parametrize(
    "hostile",
    [
        [data_frame(1, b"x", first=True, end=True)],  # number 0 is missing
        [encode_frame(Ack(1))],  # acknowledges what was never sent
        [encode_frame(Credit(0, 0, 0, 0))],
        [encode_frame(Credit(0, 0, 0, 2**31))],
        [encode_frame(Reset(0, 0, 0))],  # nothing is under way
        [data_frame(0, b"x")],  # goes on with nothing
        [data_frame(0, b"x", first=True, length=9), data_frame(1, b"x", first=True, length=9)],
        [data_frame(0, b"x", first=True, length=9), data_frame(1, b"x", end=True)],  # ends early
        [data_frame(0, b"x", first=True, length=9), data_frame(1, b"x" * 8)],  # does not end
        [data_frame(0, b"x", first=True, length=9), data_frame(1, b"x" * 9, end=True)],  # too long
        [data_frame(0, b"x", first=True, length=Limits().message + 1)],
        [data_frame(0, b"no message", first=True, end=True)],
        [encode_frame(frames.Proof(0, bytes(64)))],
        [encode_frame(Ping(bytes(8)))] * (MAX_CONTROL_BACKLOG + 1),
    ],
)
def test_a_broken_rule_is_the_peers_fault(hostile: list[bytes]) -> None:
    pair = connected()
    with pytest.raises(RemoteProtocolError):
        for frame in hostile:
            pair.cores[FOLLOWER].receive_frame(0, frame)


def test_only_the_leader_may_select() -> None:
    pair = connected()
    with pytest.raises(RemoteProtocolError):
        pair.cores[LEADER].receive_frame(0, encode_frame(Select(9, 0)))
    with pytest.raises(LocalProtocolError):
        pair.cores[FOLLOWER].select(0)


def test_sending_beyond_the_credit_is_refused() -> None:
    pair = connected()
    whole = Limits().window
    body = bytes(frames.MAX_BODY - 4)
    follower = pair.cores[FOLLOWER]
    follower.receive_frame(0, data_frame(0, body, first=True, length=Limits().message))
    follower._reserve_left = 0  # as if other messages held all of it
    follower._incoming[0].reserved = 0
    follower._incoming[0].owed = 0
    with pytest.raises(RemoteProtocolError, match="credit"):
        for seq in range(1, whole // len(body) + 3):
            follower.receive_frame(0, data_frame(seq, body))


def test_announcing_large_messages_on_every_stream_allocates_nothing() -> None:
    pair = connected()
    for stream in range(frames.MAX_STREAMS):
        pair.cores[FOLLOWER].receive_frame(0, data_frame(stream, b"x", stream, first=True, length=Limits().message))
    reserved = sum(incoming.reserved for incoming in pair.cores[FOLLOWER]._incoming.values())
    assert reserved == Limits().reserve
    assert all(len(incoming._partial or b"") == 1 for incoming in pair.cores[FOLLOWER]._incoming.values())


def test_bye_ends_the_pipe_on_both_sides() -> None:
    pair = connected()
    pair.open()
    pair.cores[LEADER].send(output(10))
    pair.cores[LEADER].close(ByeCode.IDLE, "nothing to do")
    assert sent_frames(pair, LEADER, 0) == sent_frames(pair, LEADER, 1) == [Bye(ByeCode.IDLE, "nothing to do")]
    follower = pair.cores[FOLLOWER]
    bye = encode_frame(Bye(ByeCode.IDLE, "nothing to do"))
    assert follower.receive_frame(0, bye) == [PeerClosed(ByeCode.IDLE, "nothing to do")]
    assert follower.receive_frame(1, bye) == []
    assert follower.closed
    with pytest.raises(LocalProtocolError, match="closed"):
        follower.send(output(1))


@pytest.mark.parametrize("stream", [-1, frames.MAX_STREAMS])
def test_a_stream_that_does_not_exist_is_our_mistake(stream: int) -> None:
    with pytest.raises(LocalProtocolError):
        connected().cores[LEADER].send(output(1), stream)


# -- everything at once ------------------------------------------------------------------------------------------------


class LossyCarriers(RuleBasedStateMachine):
    """Carriers open, fall silent at one end before the other, and take what they had not delivered with them.

    Whatever happens, each stream's messages arrive once and in order, and nobody exceeds the credit it was given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pair = connected(SMALL)
        self.sent: dict[tuple[int, int], list[Message]] = defaultdict(list)
        self.got: dict[tuple[int, int], list[Message]] = defaultdict(list)
        self.held: tuple[list[MessageReceived], list[MessageReceived]] = ([], [])
        self.count = 0

    def carrier(self, choice: int) -> int:
        """One of those that at least one end still has open; opened if there is none."""
        alive = [number for number, carrier in self.pair.carriers.items() if any(carrier.open)]
        return alive[choice % len(alive)] if alive else self.pair.open()

    @rule()
    def open(self) -> None:
        self.pair.open()

    @rule(choice=CHOICES, side=SIDES)
    def close_one_end(self, choice: int, side: int) -> None:
        self.pair.close(self.carrier(choice), side)

    @rule(choice=CHOICES)
    def close_both_ends(self, choice: int) -> None:
        number = self.carrier(choice)
        self.pair.close(number, LEADER)
        self.pair.close(number, FOLLOWER)

    @rule(choice=CHOICES)
    def select(self, choice: int) -> None:
        number = self.carrier(choice)
        if self.pair.carriers[number].open[LEADER]:
            self.pair.cores[LEADER].select(number)

    @rule(side=SIDES, stream=st.integers(0, 2), size=st.sampled_from((0, 30, 100, 300, 600, 3000)))
    def send(self, side: int, stream: int, size: int) -> None:
        if self.pair.cores[side].writable(stream):
            self.count += 1
            message = output(size, self.count)
            self.pair.cores[side].send(message, stream)
            self.sent[1 - side, stream].append(message)

    @rule(choice=CHOICES, side=SIDES, number=st.integers(1, 20))
    def transmit(self, choice: int, side: int, number: int) -> None:
        carrier = self.carrier(choice)
        for _ in range(number):
            ready = self.pair.cores[side].has_frames(carrier)
            assert self.pair.transmit(carrier, side) == (ready and self.pair.carriers[carrier].open[side])

    @rule(choice=CHOICES, side=SIDES, number=st.integers(1, 20))
    def deliver(self, choice: int, side: int, number: int) -> None:
        carrier = self.carrier(choice)
        for _ in range(number):
            self.pair.deliver(carrier, side)
        self.take()

    @rule()
    def settle(self) -> None:
        self.pair.settle()
        self.take()

    def take(self) -> None:
        for side in (LEADER, FOLLOWER):
            for event in self.pair.take(side):
                self.got[side, event.stream].append(event.message)
                self.held[side].append(event)

    @rule(side=SIDES)
    def flush_ack(self, side: int) -> None:
        self.pair.cores[side].flush_ack()

    @precondition(lambda self: any(self.held))
    @rule(side=SIDES, number=st.integers(1, 5))
    def consume(self, side: int, number: int) -> None:
        for event in self.held[side][:number]:
            self.pair.cores[side].consumed(event)
        del self.held[side][:number]

    @invariant()
    def arrived_once_and_in_order(self) -> None:
        for key, arrived in self.got.items():
            assert arrived == self.sent[key][: len(arrived)]

    @invariant()
    def memory_is_bounded(self) -> None:
        for side, core in enumerate(self.pair.cores):
            assert core._sent.size <= SMALL.unacked + 200
            held = sum(event.reserved for event in self.held[side])
            reserved = sum(incoming.reserved for incoming in core._incoming.values())
            assert core._reserve_left + reserved + held == SMALL.reserve
            assert core._reserve_left >= 0
            for stream, incoming in core._incoming.items():
                waiting = sum(event.held for event in self.held[side] if event.stream == stream)
                assert incoming.credit + incoming.owed + incoming._charged + waiting == SMALL.window

    def teardown(self) -> None:
        """In the end one good carrier is enough for everything."""
        for number in self.pair.carriers:
            self.pair.close(number, LEADER)
            self.pair.close(number, FOLLOWER)
        self.pair.open()
        for _ in range(2 * self.count + 2):
            self.settle()
            for side in (LEADER, FOLLOWER):
                self.consume(side, 1000)
        assert self.got == self.sent
        for core in self.pair.cores:
            core.flush_ack()
        self.pair.settle()
        assert all(core.idle for core in self.pair.cores)


LossyCarriers.TestCase.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
TestLossyCarriers = LossyCarriers.TestCase
