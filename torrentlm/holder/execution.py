"""One session's compute on one holder: the span's runner, its KV-cache and, at the head, the sampling.

Everything here runs in the device's worker thread, one step at a time; only what tells what a step has to wait for, and
what brings it, is called from the event loop.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from torrentlm.compute.adapter import Adapter
from torrentlm.compute.border import Logits, from_wire, to_wire, unpack
from torrentlm.compute.cache import SpanCache
from torrentlm.errors import ArtifactError, OutOfMemoryError, RefusedError
from torrentlm.holder.adapters import Borrowed
from torrentlm.holder.head import Emission, HeadRun
from torrentlm.holder.model import HeldModel
from torrentlm.records import Span
from torrentlm.wire.ids import ids_tensor
from torrentlm.wire.messages import Encoded, Generate, Open, Step, Want
from torrentlm.wire.tensors import Tensor

MAX_ORDERS = 4


@dataclass(frozen=True, slots=True)
class Result:
    """What a step gave: a border for the next hop, or an emission (and the ids to feed back), or tensors for the
    client (none where it only wants to know that the step is done).
    """

    border: tuple[Tensor, ...] | None = None
    emission: Emission | None = None
    fed: Tensor | None = None
    output: tuple[Tensor, ...] | None = None


class Execution:
    """``relieve`` is called in the worker thread when the device is out of memory: it lets go of what nobody needs, and
    says whether there was anything. The constructor raises RefusedError if the span or the length cannot be served.
    """

    def __init__(
        self,
        model: HeldModel,
        opened: Open,
        borrowed: Borrowed | None = None,
        relieve: Callable[[], bool] = lambda: False,
    ) -> None:
        limit = model.max_length
        if limit is not None and opened.max_length > limit:
            raise RefusedError(
                f"a session of {opened.max_length} tokens was asked for, but this model ends at {limit}: ask for fewer",
                "max_length",
            )
        self.span = span = Span(opened.first, opened.last)
        self._model = model
        self._relieve = relieve
        self._runner = model.runner(span)
        self._adapter = None if borrowed is None else self._load(borrowed)
        self._batch = opened.batch
        self._max_length = opened.max_length
        self._pads = opened.pads
        self._source = opened.source
        self._encoded: tuple[Tensor, ...] | None = None
        if bool(opened.source) != self._model.is_decoder(span):
            raise RefusedError(
                "a decoder's session says how much the encoder has read, and no other does", "bad_request"
            )
        self.kv_bytes = self._bytes_of(opened.max_length)
        self._cache: SpanCache
        self._orders: dict[int, Generate] = {}
        self._head_run: HeadRun | None = None

    def _bytes_of(self, max_length: int) -> int:
        tables = 2 * 8 * self._batch * max_length  # the mask and the positions
        return self._runner.cache_bytes(self._batch, max_length, self._source) + tables

    def fitting_length(self, room: int) -> int:
        """The longest session, in tokens, whose cache takes at most ``room`` bytes; 0 if none does."""
        return bisect_right(range(1, self._max_length), room, key=self._bytes_of)

    def _load(self, borrowed: Borrowed) -> Adapter:
        try:
            adapter = Adapter(borrowed.files, borrowed.scalings, self._runner.dtype, self._runner.device)
            self._runner.check_adapter(adapter)
        except ArtifactError as error:
            raise RefusedError(str(error), "no_adapter") from error
        return adapter

    def start(self) -> None:
        """Take the room that ``kv_bytes`` announced; nothing large is allocated before. Raises RefusedError."""
        self._cache = self._runner.open(self._batch, self._max_length, self._pads)

    def encoded(self, message: Encoded) -> None:
        """What the encoder made; it is looked into with the next step. Raises RefusedError if it has come before."""
        if self._encoded is not None or not self._source:
            raise RefusedError("a decoder's session is told once what the encoder made, and no other is", "bad_request")
        self._encoded = message.tensors

    def _take_encoded(self) -> None:
        if self._encoded and self._cache.encoded is None:
            tensors = [unpack(part) for part in self._encoded]
            self._cache.encoded = self._runner.encoded(self._cache, self._source, tensors)
            self._encoded = ()

    @property
    def is_head(self) -> bool:
        return self._runner.has_head

    @property
    def is_stem(self) -> bool:
        return self._runner.has_stem

    def order(self, order: Generate) -> None:
        """What to sample in an epoch. The device may still be busy with an older one, so a few are kept.

        Raises RefusedError for a history that is longer than the session, or no ids.
        """
        history = order.history
        if history is not None and not (
            history.dtype == "I32"
            and len(history.shape) == 2
            and history.shape[0] == self._batch
            and history.shape[1] <= self._max_length
        ):
            raise RefusedError("the history for the repetition penalty does not fit this session", "bad_request")
        self._orders[order.epoch] = order
        for epoch in sorted(self._orders)[:-MAX_ORDERS]:
            del self._orders[epoch]

    def lacks(self, step: Step) -> str:
        """What has to come before this step can run, "" if nothing."""
        if self._source and self._encoded is None:
            return "what the encoder made"
        return "what to sample" if self._needs_order(step) else ""

    def _needs_order(self, step: Step) -> bool:
        return self._emits(step) and step.epoch not in self._orders

    def _emits(self, step: Step) -> bool:
        return self.is_head and step.want == Want.SAMPLE and step.position + step.tokens > step.emit_from

    def run(self, step: Step) -> Result:
        """Run one step. Raises RefusedError or RemoteProtocolError if its tensors cannot be this span's input."""
        runner = self._runner
        self._take_encoded()
        if self._cache.length > step.position:
            runner.trim(self._cache, step.position)
        if self._cache.length < step.position:
            raise RefusedError(f"this session's cache ends at {self._cache.length}", "bad_request")
        if step.reorder is not None:
            runner.reorder(self._cache, step.reorder)
        given = from_wire(step.tensors, ids=runner.has_stem)
        emits = self._emits(step)
        want = Want.LOGITS_LAST if emits else Want.NONE if step.want == Want.SAMPLE else step.want
        try:
            result = runner.forward(self._cache, given, step.tokens, want=want, adapter=self._adapter)
        except OutOfMemoryError:
            if not self._relieve():
                raise
            result = runner.forward(self._cache, given, step.tokens, want=want, adapter=self._adapter)
        if not self.is_head:
            tensors = to_wire(result)
            return Result(output=tensors) if step.want == Want.HIDDEN else Result(border=tensors)
        if isinstance(result, Logits) and emits:
            emission = self._run_of(step.epoch).emit(result.logits, step.position + step.tokens)
            return Result(emission=emission, fed=ids_tensor([[token] for token in emission.tokens]))
        if step.want == Want.NONE:
            return Result(output=())
        if step.want == Want.SAMPLE:
            return Result()
        return Result(output=to_wire(result))

    def _run_of(self, epoch: int) -> HeadRun:
        order = self._orders.get(epoch)
        if order is None:
            raise RefusedError("the head was told to sample in another epoch", "bad_request")
        if self._head_run is None or self._head_run.order is not order:
            tokenizer = self._model.tokenizer if order.stop.strings else None
            self._head_run = HeadRun(order, batch=self._batch, max_length=self._max_length, tokenizer=tokenizer)
        return self._head_run
