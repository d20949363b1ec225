"""Runs consecutive blocks of a model by running the model's own forward, with everything outside the span left out.

Theory of operation ("boundary swap"). Every holder builds the whole module tree; what it does not hold are ghosts.
The model's forward then makes masks, positions and rotary tables from the same small arguments everywhere. Layer calls
before the span return what came over the border instead of computing; the forward is left by an exception when all is
known that later spans need. So whatever a model computes between two layers runs at the receiver, and no line here
knows any architecture.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PretrainedConfig

from torrentlm.compute.adapter import Adapter, applied
from torrentlm.compute.border import (
    ABSENT,
    Border,
    Carried,
    Logits,
    Returned,
    Slot,
    TokenIds,
    blank,
    by_slot,
    to_dtype,
)
from torrentlm.compute.cache import SNAPSHOTS, LayeredCache, SpanCache
from torrentlm.compute.conversion import convert_all
from torrentlm.compute.device import memory_errors
from torrentlm.compute.inputs import FILLER, Encoded
from torrentlm.compute.lean import make_lean
from torrentlm.compute.offload import Offload, Turns
from torrentlm.compute.probe import entry_tensors, put_entries
from torrentlm.compute.quantization.recipe import matrices
from torrentlm.compute.sizes import Point
from torrentlm.compute.skeleton import MODEL_ERRORS, build_skeleton, first_line
from torrentlm.compute.split import Split, named_weights, vocabulary_of
from torrentlm.compute.values import Place, at, flatten, rebuild, replace_at
from torrentlm.compute.weights import BlockFiles, Quantization, Weights, attach_weights
from torrentlm.errors import LocalProtocolError, OutOfMemoryError, RefusedError, RemoteProtocolError
from torrentlm.wire.messages import Want


class SpanRunner:
    """Layers ``first`` to ``last`` (``last = first - 1``: none), with the stem or the head if asked for, on one device.

    ``weights`` are the span's block files, ``quantization`` says which of them are kept in fewer bits, ``offload``
    which stay in the processor's memory; runners in one process share what they load from the same file. One forward at
    a time: calls from several threads queue up.
    ``vocabulary``: how many token ids the model knows. The constructor raises ArtifactError for unusable block files,
    StorageError for unreadable ones, UnsupportedModelError when transformers cannot build the model.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        split: Split,
        first: int,
        last: int,
        *,
        has_stem: bool = False,
        has_head: bool = False,
        weights: BlockFiles,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        quantization: Quantization | None = None,
        offload: Offload | None = None,
    ) -> None:
        if not 0 <= first <= last + 1 <= split.layers or not (first <= last or has_stem or has_head):
            raise LocalProtocolError(f"layers {first} to {last} are no span of a model of {split.layers} layers")
        if (has_stem and first > 0) or (has_head and last < split.layers - 1):
            raise LocalProtocolError("the stem goes with layer 0 and the head with the last layer")
        self.split = split
        self.layers = range(first, last + 1)
        self.has_stem = has_stem
        self.has_head = has_head
        self.dtype = dtype
        self.device = torch.device(device)
        self._model = build_skeleton(config, self.dtype, self.device)
        known = frozenset(name for name, _ in named_weights(self._model))
        convert = partial(convert_all, self._model, known=known)
        eligible = matrices(self._model) if quantization is not None and quantization.kinds else {}
        held = Weights(weights, dtype, self.device, convert, quantization, eligible, offload)
        self._weights: Weights | None = held
        self._attach(held.tensors)
        self._runs = self._model.get_submodule(split.module)
        self.vocabulary = vocabulary_of(self._model)
        self._running = threading.Lock()
        self._turns = Turns(offload, first)
        self._step: _Step | None = None
        self._output = split.inputs.output
        self._swap_layers()
        make_lean(self._model)

    def close(self) -> None:
        """Let go of all weights, now; nothing can be run any more."""
        with self._running:
            self._weights = None
            self._turns = Turns(None, 0)
            for module in self._model.modules():
                for name in (*module._parameters, *module._buffers):
                    module.__dict__.pop(name, None)  # where make_lean put them
                module._parameters.clear()
                module._buffers.clear()

    @property
    def weights(self) -> Collection[torch.Tensor]:
        """The span's weights, those kept in fewer bits too."""
        return () if self._weights is None else self._weights.tensors.values()

    # Sessions

    def open(
        self,
        batch: int,
        max_length: int,
        pads: Sequence[int] = (),
        encoded: Encoded | None = None,
    ) -> SpanCache:
        """An empty cache for ``batch`` rows of at most ``max_length`` tokens.

        Row r begins with ``pads[r]`` tokens of padding, or ends with as many if that is negative. Raises RefusedError
        if these do not fit together.
        """
        pads = tuple(pads or [0] * batch)
        if batch < 1 or max_length < 1 or len(pads) != batch or not all(abs(pad) < max_length for pad in pads):
            raise RefusedError("The session's batch, length and padding do not fit together.", "bad_request")
        return SpanCache(batch, max_length, pads, self.device, lambda: self._new_cache(max_length), encoded)

    def _new_cache(self, max_length: int) -> LayeredCache | None:
        if self.split.make_cache is None:
            return None
        entries = [frozenset(state.entries) for state in self.split.state]
        own = frozenset().union(*entries[self.layers.start : self.layers.stop])
        earlier = frozenset().union(*entries[: self.layers.start])
        later = frozenset().union(*entries[self.layers.stop :])
        return LayeredCache(self.split.make_cache(self._model.config), own, earlier, later, max_length)

    def cache_bytes(self, batch: int, max_length: int, source: int = 0) -> int:
        """Bytes that a session's cache comes to here when it is full; ``source``: tokens that an encoder has read."""
        encoded = batch * source * (self.split.width or 0) * self.dtype.itemsize
        if self.split.replays:
            return encoded + (8 * batch * max_length if self.has_stem else 0)
        numbers = 0
        for state in (self.split.state[layer] for layer in self.layers):
            growing = state.per_token * min(max_length, state.window or max_length) + state.per_row
            numbers += growing * (1 if state.trims else 1 + SNAPSHOTS) + state.per_source * source
        return encoded + numbers * batch * self.dtype.itemsize

    def encoded(self, cache: SpanCache, source: int, tensors: Sequence[torch.Tensor]) -> Encoded:
        """What a peer says that the encoder made, as ``SpanCache.encoded``; RemoteProtocolError if it cannot be."""
        due = ((cache.batch, source, self.split.width), (cache.batch, source))
        if tuple(tuple(tensor.shape) for tensor in tensors) != due or not tensors[0].is_floating_point():
            raise RemoteProtocolError(f"The encoder's states and mask must have the shapes {due[0]} and {due[1]}.")
        states, mask = tensors
        return Encoded(states.to(device=self.device, dtype=self.dtype), mask.to(device=self.device, dtype=torch.long))

    def trim(self, cache: SpanCache, length: int) -> None:
        """Forget all but the first ``length`` tokens of every row; RefusedError if the cache cannot go back so far."""
        with self._running, torch.inference_mode():
            cache.trim(length)

    def reorder(self, cache: SpanCache, rows: Sequence[int]) -> None:
        """Let row i go on from where row ``rows[i]`` is (beam search)."""
        if len(rows) != cache.batch or not all(0 <= row < cache.batch for row in rows):
            raise RefusedError(f"A session of {cache.batch} rows cannot be reordered by {list(rows)}.", "bad_request")
        with self._running, torch.inference_mode():
            cache.reorder(rows)

    def check_adapter(self, adapter: Adapter) -> None:
        """Raise ArtifactError if ``adapter`` does not fit this model."""
        adapter.check(self._model)

    # Steps

    def forward(
        self,
        cache: SpanCache,
        given: torch.Tensor | Border,
        tokens: int,
        *,
        want: int = Want.NONE,
        adapter: Adapter | None = None,
    ) -> Border | Logits:
        """Run one step of ``tokens`` >= 0 tokens per row behind those in ``cache``, with ``adapter`` if there is one.

        ``given`` are token ids, int [batch, tokens], where the span has the stem, else the border before its first
        layer. Returns the border behind the span, or logits where the span has the head and ``want`` asks for them.
        Raises RemoteProtocolError if ``given`` is not what this span takes, RefusedError if the step is too long
        ("max_length") or fails ("internal"; the cache is lost then), OutOfMemoryError (the cache is as it was).
        """
        last = want != Want.LOGITS_ALL
        point = self._check(cache, given, tokens, last)
        logits = self.has_head and want in (Want.SAMPLE, Want.LOGITS_LAST, Want.LOGITS_ALL)
        with self._running, torch.inference_mode(), applied(adapter, self._model):
            if tokens == 0:
                return self._nothing(cache.batch, logits)
            keep = 1
            if not last:
                keep = tokens if self.split.replays and self.split.inputs.causal else 0
            try:
                with memory_errors():
                    result = self._run(cache, point, given, logits, keep)
            except OutOfMemoryError:
                cache.undo_step()
                raise
            except MODEL_ERRORS as error:
                cache.broken = True
                raise RefusedError(f"The step could not be computed: {first_line(error)}", "internal") from error
            finally:
                self._step = None
            cache.length += tokens
            return result

    def _run(
        self, cache: SpanCache, point: Point, given: torch.Tensor | Border, logits: bool, keep: int
    ) -> Border | Logits:
        known: dict[Slot, torch.Tensor | None] = {}
        if isinstance(given, Border):
            cache.before_step(None)
            known.update(by_slot(self.split.borders[self.layers.start], to_dtype(given, self.dtype, self.device)))
            ids = known.get(TokenIds())
            if ids is None:
                ids = torch.full((cache.batch, point.tokens), FILLER, device=self.device)
        else:
            ids = given.to(device=self.device, dtype=torch.long)
            cache.before_step(ids)
            ids = ids if cache.ids is None else cache.ids
            known[TokenIds()] = ids
        self._step = step = _Step(cache, point, logits, known)
        try:
            with self._turns.step():
                made = getattr(self._runs(**self._arguments(cache, point, ids)), self._output)
        except _Leave:
            wanted = self.split.borders[self.layers.stop].slots
            made = (step.known[slot] for slot in wanted)
            result: Border | Logits = Border(tuple(ABSENT if tensor is None else tensor for tensor in made))
        else:
            result = Logits(made[:, -keep:])
        if cache.layered is not None:
            cache.layered.grow_later(point.tokens, self.device)
        return result

    def _arguments(self, cache: SpanCache, point: Point, ids: torch.Tensor) -> dict[str, Any]:
        names = self.split.inputs
        given: dict[str, Any] = {
            "positions": cache.position_ids[:, point.past : point.length],
            "mask": None if cache.attention_mask is None else cache.attention_mask[:, : point.length],
            "encoded": cache.encoded,
        }
        return names.arguments(self._model, point, ids, cache.states, **given)

    def _check(self, cache: SpanCache, given: torch.Tensor | Border, tokens: int, last: bool) -> Point:
        """Where the step is, once it is clear that it fits."""
        if isinstance(given, Border) == self.has_stem:
            raise RemoteProtocolError("Token ids go to the holder of the stem, activations to the others.")
        if cache.broken:
            raise RefusedError("An earlier step of this session failed half-way; open a new session.", "internal")
        if cache.length + tokens > cache.max_length:
            raise RefusedError(
                f"The session was opened for {cache.max_length} tokens: after {cache.length} no {tokens} more fit.",
                "max_length",
            )
        past = 0 if self.split.replays else cache.length
        source = 0 if cache.encoded is None else cache.encoded.states.shape[1]
        if past and tokens > 1 and not self.split.chunks:
            raise RefusedError("Behind its prompt this model takes one token at a time.", "bad_request")
        point = Point(cache.batch, cache.length + tokens - past, past, source, last)
        if not isinstance(given, Border):
            self._check_ids(given, cache.batch, tokens)
        elif tokens:
            self.split.borders[self.layers.start].check(given, point)
        return point

    def _check_ids(self, ids: torch.Tensor, batch: int, tokens: int) -> None:
        if ids.dtype not in (torch.int32, torch.int64) or tuple(ids.shape) != (batch, tokens):
            raise RemoteProtocolError(f"Token ids must be integers of shape [{batch}, {tokens}].")
        if ids.numel():
            lowest, highest = ids.aminmax()
            if lowest < 0 or highest >= self.vocabulary:
                raise RemoteProtocolError(f"Token ids must be from 0 to {self.vocabulary - 1}.")

    def _nothing(self, batch: int, logits: bool) -> Border | Logits:
        """The result of a step of no tokens."""
        if logits:
            return Logits(torch.zeros((batch, 0, self.vocabulary), dtype=self.dtype, device=self.device))
        return self.split.borders[self.layers.stop].zeros(Point(batch, 0), self.dtype, self.device)

    # Set-up

    def _attach(self, weights: Mapping[str, torch.Tensor]) -> None:
        split, canonical = self.split, self.split.canonical
        prefixes = tuple(split.layer_prefix(layer) for layer in self.layers)
        needed = {canonical.get(name, name) for name, _ in named_weights(self._model) if name.startswith(prefixes)}
        needed.update(*(split.extra[layer] for layer in self.layers))
        needed.update(split.stem if self.has_stem else (), split.head if self.has_head else ())
        attach_weights(self._model, weights, needed, canonical)

    def _swap_layers(self) -> None:
        """Let every layer call go through the step's plan; a module may be called more than once."""
        for path in dict.fromkeys(call.path for call in self.split.calls):
            module = self._model.get_submodule(path)
            module.forward = self._swapped(module.forward)
        stop, here = self.layers.stop, set(self.layers)
        wanted = self.split.borders[stop].slots
        self._keep = {
            call: [slot for slot in wanted if isinstance(slot, Returned) and slot.call == call] for call in here
        }
        self._carried_to: dict[int, dict[Place, Carried]] = {}
        for value in self.split.carried:
            for call, place in value.places:
                self._carried_to.setdefault(call, {})[place] = value.slot
        # The stem makes what is carried to calls behind the span, too: its forward goes on that far, on stand-ins.
        self._last = stop - 1
        if self.has_stem:
            self._last = max([stop - 1, *(slot.call for slot in wanted if isinstance(slot, Carried))])

    def _swapped(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            step = self._step
            if step is None:
                raise LocalProtocolError("a layer was called outside of a step")
            number, step.calls = step.calls, step.calls + 1
            if number < self.layers.start:
                return self._stand_in(step, number, args, kwargs)
            carried = self._carried_to.get(number)
            if number >= self.layers.stop:
                for place, slot in (carried or {}).items():
                    step.known.setdefault(slot, at((args, kwargs), place))
                self._leave_after(step, number)
                return self._stand_in(step, number, args, kwargs)
            if carried and not self.has_stem:  # what no border brings changes nothing: blanks do
                known = {place: step.known[slot] for place, slot in carried.items() if slot in step.known}
                args, kwargs = replace_at((args, kwargs), known)
            elif carried:
                for place, slot in carried.items():
                    step.known.setdefault(slot, at((args, kwargs), place))
            result = forward(*args, **kwargs)
            self._turns.behind(number)
            if keep := self._keep[number]:
                tensors = flatten(result)[0] + entry_tensors(self.split.calls[number].maps, args, kwargs)
                step.known.update((slot, tensors[slot.index]) for slot in keep)
            self._leave_after(step, number)
            return result

        return call

    def _leave_after(self, step: _Step, number: int) -> None:
        """End the forward where nothing is missing any more, unless the head's logits are wanted."""
        if number >= self._last and not (self.has_head and step.logits):
            raise _Leave

    def _stand_in(self, step: _Step, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a foreign layer call returns: what came over the border, blanks otherwise."""
        if number == 0 and step.cache.layered is not None:
            step.cache.layered.grow_earlier(step.point.tokens, self.device)
        call = self.split.calls[number]
        if number == self.split.layers - 1 and not self.layers and not step.logits:
            raise _Leave
        tensors = [
            step.known[slot] if (slot := Returned(number, index)) in step.known else self._blank(step, number, index)
            for index in range(len(call.tensors))
        ]
        returned = len(tensors) - sum(entry.count for entry in call.maps)
        put_entries(call.maps, args, kwargs, tensors[returned:], step.cache.states)
        return rebuild(tensors[:returned], call.form, step.cache.states)

    def _blank(self, step: _Step, number: int, index: int) -> torch.Tensor:
        shape = self.split.calls[number].tensors[index]
        if shape not in step.blanks:
            step.blanks[shape] = blank(shape, step.point, self.dtype, self.device)
        return step.blanks[shape]


@dataclass(slots=True)
class _Step:
    """What the swapped layers need to know of the running forward: where it is, whether the head's logits are wanted,
    the border's tensors as far as they are known, and how many layer calls there have been.
    """

    cache: SpanCache
    point: Point
    logits: bool
    known: dict[Slot, torch.Tensor | None]
    calls: int = 0
    blanks: dict[Any, torch.Tensor] = field(default_factory=dict)


class _Leave(Exception):
    """No error: it ends the model's forward once all is known."""
