"""The swarm as a model of transformers: its own ``generate()`` with beams, warpers, stopping criteria and streamers, on
a ``forward`` that is a step of a session. No weights here: what is sampled is logits from the head's holder.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from transformers import GenerationConfig, PretrainedConfig
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from torrentlm.client.swarm_cache import Opener, SwarmCache
from torrentlm.compute.skeleton import first_line, read_config
from torrentlm.errors import ArtifactError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INNER = ("output_attentions", "output_hidden_states", "assistant_early_exit", "use_mtp")
"""Of a generation config: what looks into the model's layers, which are elsewhere."""


@dataclass
class _Run:
    """One ``generate()``: the caches that it made, and their length."""

    max_length: int | None = None
    caches: list[SwarmCache] = field(default_factory=list)


class _Running(threading.local):
    run: _Run | None = None


class SwarmForCausalLM(GenerationMixin):  # type: ignore[misc]
    """What torrentlm.api.Model.as_transformers gives. ``config`` and ``generation_config`` are the model torrent's own;
    ``tokenizer`` is its tokenizer. Use it in a ``with``, or call :meth:`close`.

    Several threads may generate at once, each in sessions of its own.
    """

    main_input_name = "input_ids"
    input_modalities = ("text",)
    _is_stateful = False

    def __init__(
        self,
        config: PretrainedConfig,
        generation_config: GenerationConfig,
        tokenizer: PreTrainedTokenizerBase,
        opener: Opener,
    ) -> None:
        if config.is_encoder_decoder:
            raise UnsupportedModelError(
                "as_transformers() is for decoders, and this model has an encoder too: use generate() of the model"
            )
        self.config = config
        self.generation_config = generation_config
        self.tokenizer = tokenizer
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self._opener = opener
        self._running = _Running()
        self._open: dict[int, SwarmCache] = {}

    @classmethod
    def load(cls, folder: Path, tokenizer: PreTrainedTokenizerBase, opener: Opener) -> Self:
        """From a model torrent's ``folder``. Raises ArtifactError, UnsupportedModelError."""
        try:
            config = read_config(folder)
        except UnsupportedModelError:  # only holders need the model's own classes, or code
            config = PretrainedConfig.from_pretrained(folder, local_files_only=True)
        return cls(config, _read_generation_config(folder), tokenizer, opener)

    def new_cache(self, max_length: int | None = None) -> SwarmCache:
        """An empty cache to pass as ``past_key_values``, with room for ``max_length`` tokens a row (512, or a longer
        first step's). Who makes it closes it; :meth:`close` closes all.
        """
        for key, old in list(self._open.items()):
            if old.closed:
                self._open.pop(key, None)
        cache = SwarmCache(self._opener, max_length)
        self._open[id(cache)] = cache
        return cache

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate``. Its sessions are closed at the end; to go on from one, pass a cache of
        :meth:`new_cache`.

        Raises ValueError or TypeError for what a swarm cannot do, and RefusedError, NoHolderError, HolderLostError.
        """
        if kwargs.get("trust_remote_code") or isinstance(kwargs.get("custom_generate"), str):
            raise ValueError("the swarm runs no code from a hub: pass custom_generate as a function, or leave it out")
        if kwargs.get("cache_implementation") is not None:
            raise ValueError("the holders keep the cache in their own way: leave cache_implementation out")
        with self._new_run():
            return super().generate(*args, **kwargs)

    @contextmanager
    def _new_run(self) -> Iterator[None]:
        outer, run = self._running.run, _Run()
        self._running.run = run
        try:
            yield
        finally:
            self._running.run = outer
            for cache in run.caches:
                cache.close()

    def _cache(self) -> SwarmCache:
        """A cache that lives as long as the ``generate()`` in whose course it is needed."""
        run = self._running.run
        if run is None:
            raise ValueError("use_cache needs a cache: pass past_key_values=new_cache(max_length=...)")
        cache = self.new_cache(run.max_length)
        run.caches.append(cache)
        return cache

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Called by ``generate`` when batch and lengths are known: a session takes them when it is opened."""
        for name in _INNER:
            if getattr(generation_config, name, None):
                raise ValueError(f"{name} looks into the model, whose layers are with the holders: leave it out")
        if getattr(generation_config, "is_assistant", False):
            raise ValueError("the swarm cannot be another model's assistant: use it as the model that is assisted")
        cache = model_kwargs.get("past_key_values")
        _check_cache(cache)
        if self._running.run is not None:
            guesses = getattr(generation_config, "prompt_lookup_num_tokens", None) or 0  # may reach past the end
            self._running.run.max_length = generation_config.max_length + guesses
        if cache is None and generation_config.use_cache is not False:
            cache = model_kwargs["past_key_values"] = self._cache()
        mask = model_kwargs.get("attention_mask")
        if cache is not None and mask is not None:
            cache.begin(mask.shape[0], mask)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: SwarmCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """One step: int [B, n] in, ``logits`` float [B, n or ``logits_to_keep``, vocabulary] on the CPU out.

        Without ``past_key_values`` it is a session of its own, closed at once. Raises as :meth:`generate`.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("the swarm takes token ids: pass input_ids, not inputs_embeds")
        if output_attentions or output_hidden_states:
            raise ValueError("attentions and hidden states stay with the holders: only logits come back")
        if not isinstance(logits_to_keep, int):
            raise TypeError("logits_to_keep is a number of last tokens here, not a tensor of places")
        _check_cache(past_key_values)
        cache = past_key_values if past_key_values is not None or not use_cache else self._cache()
        if cache is None:
            with SwarmCache(self._opener, input_ids.shape[1]) as alone:
                logits = alone.step(input_ids, attention_mask, position_ids, logits_to_keep)
        else:
            logits = cache.step(input_ids, attention_mask, position_ids, logits_to_keep)
        output = CausalLMOutputWithPast(logits=logits, past_key_values=cache)
        return output.to_tuple() if return_dict is False else output

    __call__ = forward

    @classmethod
    def can_generate(cls) -> bool:
        return True

    @classmethod
    def is_remote_code(cls) -> bool:
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """Asked by ``generate``: which kernel experts run on is the holders' business."""
        return {}

    def close(self) -> None:
        """Close every session that is still open; a ``generate()`` in another thread ends with an error."""
        for cache in list(self._open.values()):
            cache.close()
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_cache(cache: object) -> None:
    if cache is not None and not isinstance(cache, SwarmCache):
        raise TypeError("past_key_values must be a cache of new_cache(): keys and values are with the holders")


def _read_generation_config(folder: Path) -> GenerationConfig:
    """generation_config.json, or what an old config.json says of generation, as ``from_pretrained`` chooses."""
    try:
        if (folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(folder, local_files_only=True)
        return GenerationConfig.from_model_config(json.loads((folder / "config.json").read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f"this model's generation settings cannot be read ({first_line(error)}): publish it again with correct ones"
        ) from error
