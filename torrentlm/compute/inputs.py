"""What a model's forward is called with: the arguments that it takes, found from its signature."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from torrentlm.compute.sizes import Point
from torrentlm.errors import RefusedError

FILLER = 3
"""The token id that stands where a part of the model does not get to see the real ones: none that commonly pads."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """What an encoder made of a text: ``states`` float [batch, source, width], ``mask`` int64 [batch, source]: 0 for
    padding. A constant of the decoder's session.
    """

    states: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class Inputs:
    """The names of the forward's arguments (None: it has no such) and of the result's field that is wanted.

    ``encoded`` is the class of what the encoder returns. ``causal`` models generate text; those that are ``prepared``
    have their own way of making a step's arguments.
    """

    takes: frozenset[str]
    ids: str
    output: str
    causal: bool
    prepared: bool
    mask: str | None
    positions: str | None
    keep: str | None
    cache: str | None
    use_cache: bool
    encoded: type[ModelOutput] = BaseModelOutput

    @classmethod
    def of(cls, model: PreTrainedModel, *, causal: bool) -> Inputs:
        """Those of a model without an encoder of its own, which generates text or is only ever called once."""
        own = type(model).prepare_inputs_for_generation if causal else None
        takes = _arguments_of(model)
        return cls(
            takes=takes,
            ids="input_ids",
            output="logits" if causal else "last_hidden_state",
            causal=causal,
            prepared=causal and own is not GenerationMixin.prepare_inputs_for_generation,
            mask="attention_mask" if "attention_mask" in takes else None,
            positions="position_ids" if causal and "position_ids" in takes else None,
            keep="logits_to_keep" if "logits_to_keep" in takes else None,
            cache=None,
            use_cache=_knows_use_cache(model),
        )

    @classmethod
    def of_encoder(cls, encoder: nn.Module) -> Inputs:
        takes = _arguments_of(encoder)
        mask = "attention_mask" if "attention_mask" in takes else None
        return cls(takes, "input_ids", "last_hidden_state", False, False, mask, None, None, None, use_cache=False)

    @classmethod
    def of_decoder(cls, model: PreTrainedModel) -> Inputs:
        """Those of an encoder-decoder that is given what the encoder made."""
        own = type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
        takes = _arguments_of(model)
        keep = "logits_to_keep" if "logits_to_keep" in takes else None
        return cls(takes, "decoder_input_ids", "logits", True, own, None, None, keep, None, _knows_use_cache(model))

    def arguments(
        self,
        model: PreTrainedModel,
        point: Point,
        ids: torch.Tensor,
        cache: Cache | None,
        *,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        encoded: Encoded | None = None,
    ) -> dict[str, Any]:
        """Keyword arguments for a step: ``ids`` and ``positions`` [batch, tokens], ``mask`` [batch, length] or None for
        no padding.
        """
        made: dict[str, Any] = {self.ids: ids}
        if encoded is not None:
            made["encoder_outputs"] = self.encoded(last_hidden_state=encoded.states)
            if "attention_mask" in self.takes:
                made["attention_mask"] = encoded.mask
        if self.positions is not None:
            made[self.positions] = positions
        if self.mask is not None and mask is not None:
            made[self.mask] = mask
        if self.cache is not None:
            made[self.cache] = cache
        if self.use_cache:
            made["use_cache"] = cache is not None
        if self.prepared:
            made = self._prepare(model, point, made)
        if self.keep is not None:  # some models' own way asks for the last position alone
            made[self.keep] = int(point.last)
        return {**made, "return_dict": True}

    def _prepare(self, model: PreTrainedModel, point: Point, made: dict[str, Any]) -> dict[str, Any]:
        """What the model's own code makes of them. Earlier ids may be dropped, and are not known here.

        Raises RefusedError where the model wants to see all of the text again (other rotary tables for a long one).
        """
        ids = made.pop(self.ids)
        if point.past:
            ids = torch.cat([ids.new_full((point.batch, point.past), FILLER), ids], dim=1)
        if self.mask is not None:
            made.setdefault(self.mask, torch.ones_like(ids))
        prepared = model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=point.tokens if point.past else None,
            is_first_iteration=not point.past,
            **made,
        )
        if self.cache is not None and not point.past:
            prepared[self.cache] = made[self.cache]  # an empty one is as good as what the model would make instead
        if (
            point.past
            and self.cache is not None
            and (prepared.get(self.cache) is None or prepared[self.ids].shape[1] != point.tokens)
        ):
            raise RefusedError(
                f"at {point.length} tokens this model computes all of the text anew, which no session can: end before",
                "max_length",
            )
        known = self.takes | ({"use_cache"} if self.use_cache else set())
        return {name: value for name, value in prepared.items() if name in known and value is not None}


def _arguments_of(module: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(module.forward).parameters)


def _knows_use_cache(module: nn.Module) -> bool:
    """Whether ``use_cache`` tells it to keep its state: some only pass the word on, among their other arguments."""
    parameters = inspect.signature(module.forward).parameters
    passes_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return "use_cache" in parameters or (passes_on and "past_key_values" in parameters)
