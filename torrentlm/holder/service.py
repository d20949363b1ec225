"""The holder: runs the steps of many sessions on the blocks that this node keeps resident.

Messages come in through :meth:`Holder.handle` (which never waits for compute), results leave through an
:class:`Outbox`. Each session has one task, fed by a bounded queue; the device runs one forward at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Protocol

import trio

from torrentlm.compute.device import Device
from torrentlm.errors import NetworkError, RefusedError, RemoteProtocolError
from torrentlm.holder.adapters import Adapters, Borrowed, NoAdapters
from torrentlm.holder.execution import Execution, Result
from torrentlm.holder.failures import explain, failure
from torrentlm.holder.live import Live
from torrentlm.holder.memory import Memory, Pins, UnitKey, pin_all
from torrentlm.holder.model import HeldModel
from torrentlm.holder.session import Session
from torrentlm.records import NodeKey, SessionId, Span
from torrentlm.wire.messages import (
    Close,
    Encoded,
    Fail,
    Generate,
    Halt,
    Message,
    NextHop,
    Open,
    Opened,
    Output,
    Renew,
    Step,
    Token,
    Want,
)

log = logging.getLogger(__name__)

MAX_SESSIONS = 256
"""Of one device; each device of a node has a holder of its own."""
MAX_QUEUED_STEPS = 256
MAX_QUEUED_BYTES = 512 << 20
"""Of all sessions of one device together. A client keeps a few chunks of its prompt under way, see docs/protocol.md."""
TELL_LIMIT_S = 2.0
REAP_EVERY_S = 1.0
CLIENT_WAIT_S = 10.0
"""How long a step waits for what the client says beside it (Generate, Encoded) when the activations overtook that."""


class Outbox(Protocol):
    """How a holder reaches other nodes (and itself, as a hop like any other)."""

    async def connect(self, hop: NextHop) -> None:
        """Make sure that there is a pipe to ``hop``. Raises NetworkError."""

    async def send(self, node: NodeKey, message: Message, session: SessionId) -> None:
        """Send on the session's stream. Raises NetworkError when the node cannot be reached."""


class Holder:
    """Owns every session on one device of this node. ``memory`` holds the weights, ``aside`` those that are offloaded;
    ``kv_budget`` in bytes bounds the KV-caches of all sessions together.

    ``changed`` is called when a session opens or ends, ``faulty`` when something failed that the device may be to blame
    for. A session whose client does not renew it for ``max_lease`` seconds, or for the shorter time it asked for, is
    freed.
    """

    def __init__(
        self,
        node: NodeKey,
        outbox: Outbox,
        device: Device,
        memory: Memory,
        *,
        kv_budget: int,
        aside: Memory | None = None,
        max_lease: float = 600.0,
        adapters: Adapters | None = None,
        changed: Callable[[], None] = lambda: None,
        faulty: Callable[[], None] = lambda: None,
    ) -> None:
        self._node = node
        self._outbox = outbox
        self._device = device
        self.memory = memory
        self._aside = aside or Memory(0, free=lambda: 0)
        self.memory.evicted = self._aside.evicted = self._let_go
        self.kv_budget = kv_budget
        self._max_lease = max_lease
        self._adapters = adapters or NoAdapters()
        self._changed = changed
        self._faulty = faulty
        self._gone = ""
        self._models: dict[bytes, HeldModel] = {}
        self._live: dict[SessionId, Live] = {}
        self._opening: set[SessionId] = set()
        self._nursery: trio.Nursery | None = None

    @property
    def sessions(self) -> int:
        return len(self._live)

    @property
    def kv_bytes(self) -> int:
        return sum(live.kv_bytes for live in self._live.values())

    def knows(self, session: SessionId) -> bool:
        """Whether this session is open here, or about to be."""
        return session in self._live or session in self._opening

    def hold(self, model: HeldModel) -> None:
        """Serve this model's blocks from now on."""
        self._models[model.id] = model

    async def give_up(self, why: str) -> None:
        """The device is lost: end every session, and refuse those to come, with this sentence."""
        self._gone = why
        for live in list(self._live.values()):
            await self._fail(live, live.session.epoch, "internal", why)

    def _let_go(self, keys: Collection[UnitKey]) -> None:
        for model in self._models.values():
            model.let_go(keys)
        self._device.give_back()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; every session ends with it."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self.memory.watch)
                nursery.start_soon(self._aside.watch)
                task_status.started()
                while True:
                    await trio.sleep(REAP_EVERY_S)
                    now = trio.current_time()
                    for live in [live for live in self._live.values() if live.session.expires < now]:
                        log.info("session %s: lease ran out", live.session.id.hex()[:8])
                        self._end(live)
        finally:
            self._nursery = None

    async def handle(self, sender: NodeKey, message: Message) -> None:
        """Take one message of ``sender``, an authenticated peer or this node itself."""
        match message:
            case Open() if self._nursery is not None:
                # A task of its own: a span that no route used before is built in a thread first.
                fresh = message.session not in self._live and message.session not in self._opening
                if fresh:
                    self._opening.add(message.session)
                self._nursery.start_soon(self._open, sender, message, fresh)
            case Step():
                await self._step(sender, message)
            case Generate() if live := self._of_client(sender, message.session):
                await self._order(live, message)
            case Encoded() if live := self._of_client(sender, message.session):
                await self._encoded(live, message)
            case Halt():
                await self._halt(sender, message)
            case Renew():
                for session in message.sessions:
                    if live := self._of_client(sender, session):
                        live.session.renew(trio.current_time())
            case Close():
                self._opening.discard(message.session)
                if live := self._of_client(sender, message.session):
                    self._end(live)
            case Fail():
                await self._next_failed(sender, message)
            case _:
                pass

    async def _order(self, live: Live, order: Generate) -> None:
        try:
            live.execution.order(order)
        except RefusedError as error:
            await self._fail(live, order.epoch, *explain(error))
        live.wake()

    async def _encoded(self, live: Live, message: Encoded) -> None:
        try:
            live.execution.encoded(message)
        except (RefusedError, RemoteProtocolError) as error:
            await self._fail(live, live.session.epoch, *explain(error))
        live.wake()

    async def _next_failed(self, sender: NodeKey, message: Fail) -> None:
        """The next holder refused a step (it answers to whoever sent it): only the client can act on that."""
        for live in list(self._live.values()):
            hop = live.session.next
            if hop is not None and (hop.node, hop.session) == (sender, message.session):
                await self._fail(live, message.epoch, message.code, message.message, end=False)

    def _of_client(self, sender: NodeKey, session: SessionId) -> Live | None:
        live = self._live.get(session)
        return live if live is not None and live.session.client == sender else None

    async def _open(self, sender: NodeKey, message: Open, fresh: bool) -> None:
        try:
            if not fresh:
                raise RefusedError("this session is open already", "bad_request")  # noqa: TRY301
            live = await self._admit_session(sender, message)
        except Exception as error:
            # What a peer asks for may fail in ways that only the model's own code knows.
            fail = failure(message.session, message.epoch, *self._explain(error), message.first)
            await self._tell(sender, fail, message.session)
            return
        finally:
            if fresh:
                self._opening.discard(message.session)
        if live is None:
            return
        if message.next is not None and message.next.node != self._node and self._nursery is not None:
            self._nursery.start_soon(self._dial_ahead, message.next)
        opened = Opened(message.session, message.epoch, live.kv_bytes, int(live.session.lease_s * 1000))
        await self._tell(sender, opened, message.session)

    async def _admit_session(self, client: NodeKey, message: Open) -> Live | None:
        """The session, with its room; None if the client closed it before it was open."""
        if self._gone:
            raise RefusedError(self._gone, "no_block")
        model = self._models.get(message.model)
        if model is None:
            raise RefusedError("this peer holds no block of that model", "wrong_model")
        if len(self._live) + len(self._opening) > MAX_SESSIONS:
            raise RefusedError(f"this holder serves {MAX_SESSIONS} sessions already: try again later", "busy")
        span = Span(message.first, message.last)
        borrowed, live = None, None
        pin = await pin_all((self.memory, model.units(span)), (self._aside, model.units_aside(span)))
        try:
            if message.adapter is not None:
                borrowed = await self._adapters.borrow(model.id, message.adapter, span)
            live = await self._admit(client, message, model, pin, borrowed)
        finally:
            if live is None:
                pin.release()
                if borrowed is not None:
                    borrowed.give_back()
        return live

    async def _admit(
        self, client: NodeKey, message: Open, model: HeldModel, pin: Pins, borrowed: Borrowed | None
    ) -> Live | None:
        execution = await trio.to_thread.run_sync(Execution, model, message, borrowed, self._relieve)
        if message.session not in self._opening:
            return None
        if self._nursery is None:
            raise RefusedError("this holder is shutting down", "busy")
        if self.kv_bytes + execution.kv_bytes > self.kv_budget:
            free = max(0, self.kv_budget - self.kv_bytes)
            raise RefusedError(
                f"a KV-cache of {execution.kv_bytes / 1e6:.2f} MB does not fit: this holder has {free / 1e6:.2f} MB "
                f"left; a session of at most {execution.fitting_length(free)} tokens would fit",
                "memory",
            )
        execution.start()
        lease = min(message.lease_ms / 1000, self._max_lease)
        session = Session(
            id=message.session,
            client=client,
            span=execution.span,
            has_stem=execution.is_stem,
            prev=frozenset(message.prev),
            next=message.next,
            batch=message.batch,
            max_length=message.max_length,
            pads=message.pads,
            lease_s=lease,
            expires=trio.current_time() + lease,
            epoch=message.epoch,
        )
        queue, steps = trio.open_memory_channel[Step](MAX_QUEUED_STEPS)
        live = Live(session, execution, execution.kv_bytes, queue, pin, borrowed)
        self._live[session.id] = live
        self._nursery.start_soon(self._serve, live, steps)
        self._changed()
        return live

    def _relieve(self) -> bool:
        """Called from a worker thread."""
        return trio.from_thread.run_sync(self.memory.relieve)

    async def _dial_ahead(self, hop: NextHop) -> None:
        """So that the first step does not wait for a dial; a failure shows when the step is sent."""
        try:
            await self._outbox.connect(hop)
        except NetworkError as error:
            log.info("%s", error)

    async def _step(self, sender: NodeKey, step: Step) -> None:
        live = self._live.get(step.session)
        if live is None:
            # Stale steps of a session just closed are normal; only the client can act on the news.
            fail = failure(step.session, step.epoch, "unknown_session", "this session is not open here", None)
            await self._tell(sender, fail, step.session)
            return
        try:
            if sum(live.queued_bytes for live in self._live.values()) + step.nbytes > MAX_QUEUED_BYTES:
                raise RefusedError("too much input waits here: send less of a prompt at once", "busy")  # noqa: TRY301
            if live.session.admit(sender, step.epoch, step.position, step.tokens):
                live.queue.send_nowait(step)
                live.queued_bytes += step.nbytes
        except (RefusedError, RemoteProtocolError) as error:
            await self._fail(live, step.epoch, *explain(error), end=False)
        except trio.WouldBlock:
            await self._fail(
                live, step.epoch, "busy", f"more than {MAX_QUEUED_STEPS} steps of this session are waiting"
            )

    async def _halt(self, sender: NodeKey, message: Halt) -> None:
        live = self._live.get(message.session)
        if live is None or not live.session.may_send_steps(sender) or not live.session.halt(message.epoch):
            return
        live.wake()
        # From the head around the ring: the stop passes every holder once and ends where it began.
        hop = live.session.next
        if hop is not None and not live.execution.is_head:
            await self._tell(hop.node, Halt(hop.session, message.epoch), hop.session)

    async def _serve(self, live: Live, steps: trio.MemoryReceiveChannel[Step]) -> None:
        try:
            with live.scope:
                async for step in steps:
                    live.queued_bytes -= step.nbytes
                    if live.session.is_stale(step.epoch):
                        continue
                    failure = await self._advance(live, step)
                    if failure is not None and not live.session.is_stale(step.epoch):
                        await self._fail(live, step.epoch, *failure)
        finally:
            steps.close()
            self._end(live)

    async def _advance(self, live: Live, step: Step) -> tuple[str, str] | None:
        """Run one step and send on what it gave; a failure's code and sentence if that cannot be."""
        try:
            await self._await_all(live, step)
            result = await self._device.run(live.execution.run, step)
            if not live.session.is_stale(step.epoch):
                await self._deliver(live, step, result)
        except Exception as error:
            # The one place where a bug in a model's forward must not take the other sessions with it.
            return self._explain(error)
        return None

    def _explain(self, error: Exception) -> tuple[str, str]:
        code, sentence = explain(error)
        if code == "internal":
            self._faulty()
        return code, sentence

    async def _await_all(self, live: Live, step: Step) -> None:
        """Wait for what the client sends beside the steps and may have been overtaken by one."""

        def lacking() -> str:
            return "" if live.session.is_stale(step.epoch) else live.execution.lacks(step)

        with trio.move_on_after(CLIENT_WAIT_S):
            while lacking():
                await live.changed.wait()
        if what := lacking():
            raise RefusedError(f"this holder was never told {what}", "bad_request")

    async def _deliver(self, live: Live, step: Step, result: Result) -> None:
        session, hop = live.session, live.session.next
        after = step.position + step.tokens
        if result.emission is not None:
            emission = result.emission
            token = Token(session.id, step.epoch, after, emission.index, emission.tokens, emission.finish)
            if emission.finish is not None:
                session.halt(step.epoch)
                await self._outbox.send(session.client, token, session.id)
                if hop is not None:
                    await self._tell(hop.node, Halt(hop.session, step.epoch), hop.session)
                return
            if hop is not None and result.fed is not None:
                # The next lap first: the client's copy of the token is not on the critical path.
                fed = Step(hop.session, step.epoch, after, step.emit_from, Want.SAMPLE, None, (result.fed,), 1)
                await self._outbox.send(hop.node, fed, hop.session)
            await self._outbox.send(session.client, token, session.id)
        elif result.border is not None and hop is not None and not live.execution.is_head:
            onward = Step(
                session=hop.session,
                epoch=step.epoch,
                position=step.position,
                emit_from=step.emit_from,
                want=step.want,
                reorder=step.reorder,
                tensors=result.border,
                tokens=step.tokens,
            )
            await self._outbox.send(hop.node, onward, hop.session)
        elif result.output is not None:
            await self._outbox.send(
                session.client, Output(session.id, step.epoch, step.position, result.output), session.id
            )

    async def _fail(self, live: Live, epoch: int, code: str, message: str, *, end: bool = True) -> None:
        session = live.session
        await self._tell(session.client, failure(session.id, epoch, code, message, session.span.first), session.id)
        if end:
            self._end(live)

    async def _tell(self, node: NodeKey, message: Message, session: SessionId) -> None:
        """Send what nobody waits for: a peer that is gone or takes nothing misses it, and holds up nobody else."""
        with trio.move_on_after(TELL_LIMIT_S):
            try:
                await self._outbox.send(node, message, session)
            except NetworkError as error:
                log.debug("%s", error)

    def _end(self, live: Live) -> None:
        if self._live.pop(live.session.id, None) is not None:
            live.scope.cancel()
            live.queue.close()
            live.pin.release()
            if live.borrowed is not None:
                live.borrowed.give_back()
            self._changed()
