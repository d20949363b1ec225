"""One side of a model as transformers itself runs it, on the block files' weights: what the parts are compared with.

Nothing is cut here. Where the weights would take too much memory all at once, they come part by part while the model's
forward runs (``streamed``). Whatever the blocks do not bring, or not yet, reads as NaN: a model that needs it gives
nothing that anybody could take for a result.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig

from torrentlm.compute.border import ABSENT, Carried, Returned, Slot, TokenIds
from torrentlm.compute.chain import Part
from torrentlm.compute.conversion import convert_all
from torrentlm.compute.inputs import Encoded
from torrentlm.compute.probe import entry_tensors
from torrentlm.compute.sizes import Point
from torrentlm.compute.skeleton import MODEL_ERRORS, build_skeleton, first_line, replace_parameters
from torrentlm.compute.split import Split, named_weights, vocabulary_of
from torrentlm.compute.values import at, flatten
from torrentlm.compute.weights import Weights, attach_weights
from torrentlm.errors import RefusedError, UnsupportedModelError


class Whole:
    """``parts`` are all blocks of the side, in order. Raises what ``build_skeleton`` and ``Weights`` raise.

    ``streamed``: a part's weights are there only while it runs, so that no more memory is taken than the largest needs.
    """

    def __init__(
        self, config: PretrainedConfig, split: Split, parts: Sequence[Part], dtype: torch.dtype, *, streamed: bool
    ) -> None:
        self._split = split
        self._parts = parts
        self._dtype = dtype
        self._streamed = streamed
        self._model = build_skeleton(config, dtype)
        self._runs = self._model.get_submodule(split.module)
        self._known = frozenset(name for name, _ in named_weights(self._model))
        self._names = {split.canonical.get(name, name) for name in self._known}
        self._here: set[str] = set()
        self._weights: Weights | None = None
        self._detach(self._names)
        if not streamed:
            self._attach(parts)

    @property
    def vocabulary(self) -> int:
        """How many token ids the model knows."""
        return vocabulary_of(self._model)

    def run(
        self, steps: Sequence[torch.Tensor], encoded: Encoded | None = None, positions: Collection[int] = ()
    ) -> tuple[list[torch.Tensor], dict[int, tuple[torch.Tensor, ...]]]:
        """What the model makes of each of consecutive steps of one text: logits (hidden states, where it has none) of
        every position, [batch, n, …]; ``steps`` are ids, int64 [batch, n].

        And what travelled over the borders ``positions`` in the first step (into which layer call; their number: into
        the head). Raises UnsupportedModelError if the model's own code fails.
        """
        known: dict[Slot, torch.Tensor] = {TokenIds(): steps[0]}
        with self._followed(known, {slot for at in positions for slot in self._split.borders[at].slots}):
            results = self._run(steps, encoded)
        return results, {at: tuple(known[slot] for slot in self._split.borders[at].slots) for at in positions}

    def decode(
        self, ids: torch.Tensor, tokens: int, encoded: Encoded | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What transformers' own ``generate`` adds greedily to ``ids``, int64 [batch, n]: the ids [batch, tokens], and
        the logits [batch, tokens, vocabulary] that they were picked from.

        Raises UnsupportedModelError if the model's own code fails.
        """
        given: dict[str, Any] = {self._split.inputs.ids: ids, "attention_mask": torch.ones_like(ids)}
        if encoded is not None:
            states = self._split.inputs.encoded(last_hidden_state=encoded.states)
            given |= {"encoder_outputs": states, "attention_mask": encoded.mask}
        plain = GenerationConfig(
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            decoder_start_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        with self._followed({}, ()):
            try:
                made = self._model.generate(**given, generation_config=plain)
            except MODEL_ERRORS as error:
                raise UnsupportedModelError(f"the whole model cannot be run here: {first_line(error)}") from error
        return made.sequences[:, -tokens:], torch.stack(made.logits, dim=1)

    def release(self) -> None:
        """Let go of all weights; this is not to be run any more, unless it is streamed."""
        self._detach(self._here)
        self._weights = None

    def _run(self, steps: Sequence[torch.Tensor], encoded: Encoded | None) -> list[torch.Tensor]:
        split = self._split
        batch, length = steps[0].shape[0], sum(ids.shape[1] for ids in steps)
        positions = torch.arange(length).expand(batch, length)
        text, past = torch.cat(list(steps), dim=1), 0
        cache = None if split.make_cache is None else split.make_cache(self._model.config)
        results = []
        for ids in steps:
            end = past + ids.shape[1]
            start = 0 if split.replays else past
            point = Point(batch, end - start, start, 0 if encoded is None else encoded.states.shape[1])
            try:
                arguments = split.inputs.arguments(
                    self._model,
                    point,
                    text[:, start:end],
                    cache,
                    positions=positions[:, start:end],
                    mask=None,
                    encoded=encoded,
                )
            except RefusedError as error:
                raise UnsupportedModelError(f"this model cannot be published as it is: {error}") from error
            if split.inputs.keep is not None:
                arguments[split.inputs.keep] = 0  # all
            output = self._forward(arguments)
            made = getattr(output, split.inputs.output)
            results.append(made[:, -ids.shape[1] :] if split.inputs.causal else made)
            past = end
        return results

    def _forward(self, arguments: dict[str, Any]) -> Any:
        try:
            with torch.inference_mode():
                return self._runs(**arguments)
        except MODEL_ERRORS as error:
            raise UnsupportedModelError(
                f"the whole model cannot be run here, so nothing is proven: {first_line(error)}"
            ) from error

    @contextmanager
    def _followed(self, known: dict[Slot, torch.Tensor], wanted: Collection[Slot]) -> Iterator[None]:
        """Follow the layer calls: to get the ``wanted`` values of the first step, and to have the next part's weights
        there in time.
        """
        split = self._split
        calls = 0
        begins = {part.layers.stop: number for number, part in enumerate(self._parts[:-1], 1)} if self._streamed else {}
        carried = [slot for slot in wanted if isinstance(slot, Carried)]
        returned = [slot for slot in wanted if isinstance(slot, Returned)]

        def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for slot in carried:
                if slot.call == calls:
                    value = at((args, kwargs), slot.place)
                    known[slot] = ABSENT if value is None else value.clone()
            if calls % split.layers == 0 and 0 in begins:  # the first part is the stem alone
                self._bring(begins[0])

        def after(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            nonlocal calls
            if any(slot.call == calls for slot in returned):
                made = flatten(output)[0] + entry_tensors(split.calls[calls].maps, args, kwargs)
                known.update((slot, made[slot.index].clone()) for slot in returned if slot.call == calls)
            end = calls % split.layers + 1
            calls += 1
            if end in begins:
                self._bring(begins[end])

        def followed(forward: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                before(args, kwargs)
                output = forward(*args, **kwargs)
                after(args, kwargs, output)
                return output

            return call

        begin = self._runs.register_forward_pre_hook(lambda *_: self._bring(0)) if self._streamed else None
        modules = [self._model.get_submodule(path) for path in dict.fromkeys(call.path for call in split.calls)]
        for module in modules:  # no hooks: some models call a layer's forward directly
            module.forward = followed(module.forward)
        try:
            yield
        finally:
            for module in modules:
                del module.forward
            if begin is not None:
                begin.remove()

    def _bring(self, number: int) -> None:
        """Have the weights of this part and of no other."""
        self.release()
        self._attach(self._parts[number : number + 1])

    def _attach(self, parts: Sequence[Part]) -> None:
        files = dict.fromkeys(file for part in parts for file in part.files)
        convert = partial(convert_all, self._model, known=self._known)
        self._weights = Weights(files, self._dtype, torch.device("cpu"), convert)
        canonical = self._split.canonical
        self._here = {canonical.get(name, name) for name in self._weights.tensors} & self._names
        attach_weights(self._model, self._weights.tensors, self._here, canonical)

    def _detach(self, names: set[str]) -> None:
        def replaced(name: str, parameter: nn.Parameter) -> nn.Parameter:
            if name not in names or not parameter.is_floating_point():
                return parameter
            nothing = torch.full((), torch.nan, dtype=parameter.dtype).expand(parameter.shape)
            return nn.Parameter(nothing, requires_grad=parameter.requires_grad)

        replace_parameters(self._model, replaced)
