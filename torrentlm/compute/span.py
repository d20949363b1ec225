"""Runs consecutive blocks of a model by running the model's own forward, with everything outside the span left out.

Theory of operation ("boundary swap"). Every holder builds the whole module tree; what it does not hold are ghosts.
The model's forward then makes masks, positions and rotary tables from the same small arguments everywhere. Layers
before the span return what came over the border instead of computing; the forward is left by an exception when the
span's last layer returns. So whatever a model computes between two layers runs exactly once, at the receiver, and no
line here knows any architecture.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from torrentlm.compute.border import Border, BorderShape, Logits, rebuild, replace_at, tensors_at, to_dtype
from torrentlm.compute.cache import SpanCache
from torrentlm.compute.lean import make_lean
from torrentlm.compute.skeleton import build_skeleton, first_line
from torrentlm.compute.split import Split, find_layer_stack, forward_arguments, named_weights
from torrentlm.compute.weights import BlockFiles, Weights, attach_weights
from torrentlm.errors import LocalProtocolError, RefusedError, RemoteProtocolError
from torrentlm.wire.messages import Want


class SpanRunner:
    """Layers ``first`` to ``last`` (``last = first - 1``: none), with the stem or the head if asked for, on one device.

    ``weights`` are the span's block files; runners in one process share what they load from the same file. One forward
    at a time: calls from several threads queue up. The constructor raises ArtifactError for unusable block files,
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
        self._weights = Weights(weights, dtype, self.device)
        self._attach(self._weights.tensors)
        self._takes = forward_arguments(self._model)
        self._vocabulary = self._model.get_input_embeddings().num_embeddings
        self._running = threading.Lock()
        self._step: _Step
        self._swap_layers(find_layer_stack(self._model)[1])
        make_lean(self._model)

    # Sessions

    def open(self, batch: int, max_length: int, pads: Sequence[int] = ()) -> SpanCache:
        """An empty cache for ``batch`` rows of at most ``max_length`` tokens.

        Row r begins with ``pads[r]`` tokens of padding. Raises RefusedError if these do not fit together.
        """
        pads = pads or [0] * batch
        if batch < 1 or max_length < 1 or len(pads) != batch or not all(0 <= pad < max_length for pad in pads):
            raise RefusedError("The session's batch, length and padding do not fit together.", "bad_request")
        return SpanCache.open(self._model.config, self.layers, batch, max_length, pads, self.device)

    def cache_bytes(self, batch: int, max_length: int) -> int:
        """Bytes that a session's cache comes to here when it is full."""
        return sum(self.split.state[layer] for layer in self.layers) * batch * max_length * self.dtype.itemsize

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

    # Steps

    def expects(self, batch: int, tokens: int) -> BorderShape | None:
        """What a step must bring: the border's exact sizes, or None for token ids."""
        return None if self.has_stem else self.split.borders[self.layers.start].at(batch, tokens)

    def forward(self, cache: SpanCache, given: torch.Tensor | Border, *, want: int = Want.NONE) -> Border | Logits:
        """Run one step of n >= 0 tokens per row behind those in ``cache``.

        ``given`` are token ids, int [batch, n], where the span has the stem, else the border before its first layer.
        Returns the border behind the span, or logits where the span has the head and ``want`` asks for them. Raises
        RemoteProtocolError if ``given`` is not what this span takes, RefusedError if the step is too long
        ("max_length") or fails ("internal"; the cache is lost then).
        """
        tokens = self._check(cache, given)
        logits = self.has_head and want in (Want.SAMPLE, Want.LOGITS_LAST, Want.LOGITS_ALL)
        with self._running, torch.inference_mode():
            if tokens == 0:
                return self._nothing(cache.batch, logits)
            self._step = _Step(cache, tokens, logits, keep=0 if want == Want.LOGITS_ALL else 1)
            try:
                result = self._run(self._step, given)
            except (RuntimeError, ValueError, IndexError, MemoryError) as error:  # out of the model's own code
                cache.broken = True
                raise RefusedError(f"The step could not be computed: {first_line(error)}", "internal") from error
            finally:
                del self._step
            cache.length += tokens
            return result

    def _run(self, step: _Step, given: torch.Tensor | Border) -> Border | Logits:
        cache = step.cache
        end = cache.length + step.tokens
        if isinstance(given, Border):
            step.border = to_dtype(given, self.dtype, self.device)
            ids = torch.zeros((cache.batch, step.tokens), dtype=torch.long, device=self.device)
        else:
            ids = given.to(device=self.device, dtype=torch.long)
        arguments = {
            "input_ids": ids,
            "position_ids": cache.position_ids[:, cache.length : end],
            self.split.cache: cache.states,
            "use_cache": True,
            "logits_to_keep": step.keep,
        }
        if cache.attention_mask is not None:
            arguments["attention_mask"] = cache.attention_mask[:, :end]
        taken = {name: value for name, value in arguments.items() if name in self._takes}
        try:
            logits = self._model(**taken, return_dict=True).logits
        except _Leave as leave:
            result: Border | Logits = leave.border
        else:
            result = Logits(logits[:, -step.keep :])
        cache.grow(cache.later, step.tokens)
        return result

    def _check(self, cache: SpanCache, given: torch.Tensor | Border) -> int:
        """The number of tokens of a step, once it is clear that the step fits."""
        if isinstance(given, Border) == self.has_stem:
            raise RemoteProtocolError("Token ids go to the holder of the stem, activations to the others.")
        if isinstance(given, Border):
            shape = self.split.borders[self.layers.start]
            tokens = shape.tokens_of(given)
            shape.at(cache.batch, tokens).check(given)
        else:
            tokens = self._check_ids(given, cache.batch)
        if cache.broken:
            raise RefusedError("An earlier step of this session failed half-way; open a new session.", "internal")
        if cache.length + tokens > cache.max_length:
            raise RefusedError(
                f"The session was opened for {cache.max_length} tokens: after {cache.length} no {tokens} more fit.",
                "max_length",
            )
        return tokens

    def _check_ids(self, ids: torch.Tensor, batch: int) -> int:
        if ids.dtype not in (torch.int32, torch.int64) or ids.dim() != 2 or ids.shape[0] != batch:
            raise RemoteProtocolError(f"Token ids must be integers of shape [{batch}, tokens].")
        if ids.numel():
            lowest, highest = ids.aminmax()
            if lowest < 0 or highest >= self._vocabulary:
                raise RemoteProtocolError(f"Token ids must be from 0 to {self._vocabulary - 1}.")
        return ids.shape[1]

    def _nothing(self, batch: int, logits: bool) -> Border | Logits:
        """The result of a step of no tokens."""
        if logits:
            return Logits(torch.zeros((batch, 0, self._vocabulary), dtype=self.dtype, device=self.device))
        return self.split.borders[self.layers.stop].at(batch, 0).zeros(self.dtype, self.device)

    # Set-up

    def _attach(self, weights: Mapping[str, torch.Tensor]) -> None:
        split, canonical = self.split, self.split.canonical
        prefixes = tuple(split.layer_prefix(layer) for layer in self.layers)
        needed = {canonical.get(name, name) for name, _ in named_weights(self._model) if name.startswith(prefixes)}
        needed.update(*(split.extra[layer] for layer in self.layers))
        needed.update(split.stem if self.has_stem else (), split.head if self.has_head else ())
        attach_weights(self._model, weights, needed, canonical)

    def _swap_layers(self, stack: nn.ModuleList) -> None:
        first, stop = self.layers.start, self.layers.stop
        for index, layer in enumerate(stack):
            if index < first:
                layer.forward = self._stand_in(index)
            elif index >= stop:
                layer.forward = self._leave_before
        if self.layers:
            if first == 0 and not self.has_stem:
                stack[0].forward = self._enter(stack[0].forward)
            stack[stop - 1].forward = self._leave_after(stack[stop - 1].forward)

    def _stand_in(self, index: int) -> Callable[..., Any]:
        """For a layer before the span. The last of them returns the border, the others something of its shape.

        (A model may change in place what a layer returned: the border must not go through that before its turn.)
        """
        is_first, is_last = index == 0, index == self.layers.start - 1

        def earlier_layer(*args: Any, **kwargs: Any) -> Any:
            step = self._step
            if is_first:
                step.cache.grow(step.cache.earlier, step.tokens)
            if not is_last:
                return step.blank()
            if not self.layers and not step.logits:
                raise _Leave(step.border)
            return step.border.value

        return earlier_layer

    def _enter(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """For layer 0 without the stem: what the stem would have made comes over the border."""

        def first_layer(*args: Any, **kwargs: Any) -> Any:
            swapped = dict(zip(self.split.entry, self._step.border.tensors, strict=True))
            args, kwargs = replace_at((args, kwargs), swapped)
            return forward(*args, **kwargs)

        return first_layer

    def _leave_before(self, *args: Any, **kwargs: Any) -> Any:
        """For the layer after a span that has none, which is the stem: what it made for layer 0 is the border."""
        made = dict(tensors_at((args, kwargs)))
        raise _Leave(Border(tuple(made[place] for place in self.split.entry)))

    def _leave_after(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """For the span's last layer, unless the head's logits are wanted."""

        def last_layer(*args: Any, **kwargs: Any) -> Any:
            result = forward(*args, **kwargs)
            if not self._step.logits:
                raise _Leave(Border.of(result))
            return result

        return last_layer


NO_BORDER = Border(())


@dataclass(slots=True)
class _Step:
    """What the swapped layers need to know of the running forward. ``keep``: positions with logits, 0 for all."""

    cache: SpanCache
    tokens: int
    logits: bool
    keep: int
    border: Border = NO_BORDER
    _blank: Any = None

    def blank(self) -> Any:
        if self._blank is None:
            self._blank = rebuild([torch.zeros_like(tensor) for tensor in self.border.tensors], self.border.tree)
        return self._blank


class _Leave(Exception):
    """No error: it carries the border out of the model's forward."""

    def __init__(self, border: Border) -> None:
        self.border = border
