"""The reference of every row: a tiny random model that transformers builds, runs and decodes by itself."""

from __future__ import annotations

import inspect
import shutil
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from shrink import WINDOW, NoConfig, tiny_configs
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

from torrentlm.compute.skeleton import read_config

AUTO = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM, "seq2seq": AutoModelForSeq2SeqLM}
MAPPINGS: dict[str, dict[str, str]] = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
TOKENS = 24
CLOSE = 1e-4
"""How far apart logits may be, as a share of the largest, where other sizes of products are allowed to round."""
NOT_GENERIC = (
    "eos_token_id", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens",
    "repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "max_length", "min_length",
)  # fmt: skip
"""Settings of ``generate`` that would end a text early or choose another token than the most likely."""


Mask = torch.Tensor | None
"""Int [batch, tokens]: 0 where a row is padded; None where none is."""


class Unbuildable(Exception):
    """transformers does not build or run this model by itself; says why."""


@dataclass(frozen=True)
class Decoded:
    """Greedy ``tokens`` [batch, n] and the ``logits`` [batch, n, vocabulary] that they were picked from."""

    tokens: torch.Tensor
    logits: torch.Tensor


def random_ids(batch: int, tokens: int, seed: int) -> torch.Tensor:
    """Token ids [batch, tokens] that stand for nothing special."""
    return torch.randint(3, 60, (batch, tokens), generator=torch.Generator().manual_seed(seed))


IDS = random_ids(1, 7, 1)
PAIR = random_ids(2, 7, 2)
LONG = random_ids(1, 2 * WINDOW + 5, 3)
PADS = (3, 0)
MASK = torch.tensor([[0] * 3 + [1] * 4, [1] * 7])
CHUNKS = (WINDOW + 2, 2 * WINDOW, 2 * WINDOW + 5)
"""Where the chunks of the long prompt end."""


def build(kind: str, model_type: str, folder: Path) -> PreTrainedModel:
    """A small model that runs, its config saved in ``folder`` as a checkpoint's would be; raises Unbuildable."""
    errors: list[str] = []
    try:
        for config in tiny_configs(model_type, **({"is_decoder": True} if kind == "causal" else {})):
            try:
                model = AUTO[kind].from_config(config, dtype=torch.float32)
                return _prepared(kind, _saved(kind, model, config, folder))
            except Exception as error:  # any model's own code runs here
                errors.append(said(error))
    except NoConfig as error:
        errors.append(str(error))
    raise Unbuildable(errors[0])


def reloaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model, saved in ``folder``/checkpoint. What is never saved, since its code makes it, is as transformers
    makes it when it loads the checkpoint.
    """
    checkpoint = folder / "checkpoint"
    model.save_pretrained(checkpoint)
    shutil.copy(folder / "config.json", checkpoint)
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        saved = set(file.keys())
    own = model.state_dict(keep_vars=True)
    written = {id(own[name]) for name in saved & own.keys()}
    made = [name for name in own.keys() - saved if id(own[name]) not in written]
    if made and saved <= own.keys():  # else the checkpoint is of another form, and all of it is saved
        again = type(model).from_pretrained(checkpoint, dtype=torch.float32).state_dict()
        with torch.no_grad():
            for name in made:
                own[name].copy_(again[name])
    return model


def _saved(kind: str, model: PreTrainedModel, config: PretrainedConfig, folder: Path) -> PretrainedConfig:
    """The config as a checkpoint has it, read back: the model's own, or the larger one that it was made from."""
    for candidate in (model.config, config):
        candidate.architectures = [type(model).__name__]
        candidate.save_pretrained(folder)
        saved = read_config(folder)
        if type(saved) in AUTO[kind]._model_mapping:
            return saved
    raise Unbuildable("transformers saves a config that it does not read again")


def _prepared(kind: str, config: PretrainedConfig) -> PreTrainedModel:
    """The model of a config, with the largest random weights under which its logits stay finite."""
    model = AUTO[kind].from_config(config, dtype=torch.float32).eval()
    if model.can_generate():
        for name in NOT_GENERIC:
            setattr(model.generation_config, name, None)
        if model.generation_config.decoder_start_token_id is None:
            model.generation_config.decoder_start_token_id = 1
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for scale in (0.3, 0.1, None):
        model.load_state_dict(own)
        if scale is not None:
            _randomise(model, scale)
        logits = whole_logits(kind, model, IDS)
        if logits.isfinite().all() and logits.std() > 0:
            if not torch.equal(logits, whole_logits(kind, model, IDS)):
                raise Unbuildable("the model's logits differ from one run to the next")
            return model
    raise Unbuildable("the tiny model's logits are not finite")


def _randomise(model: PreTrainedModel, scale: float) -> None:
    """Random values everywhere, also where a fresh model has zeros and ones: a weight left behind must be seen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        matrices = {id(parameter) for parameter in model.parameters() if parameter.dim() > 1}
        for tensor in model.state_dict(keep_vars=True).values():
            if id(tensor) in matrices:
                tensor.normal_(0, scale, generator=generator)
            elif tensor.is_floating_point():  # buffers too, and never below zero: some are variances
                tensor.add_(torch.rand(tensor.shape, generator=generator), alpha=0.1)


def takes(model: PreTrainedModel) -> frozenset[str]:
    """The names of the arguments of the model's own forward."""
    return frozenset(inspect.signature(model.forward).parameters)


def whole_logits(
    kind: str, model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The logits that the model gives for ``ids`` in one forward: of the last position, or of all of a masked one."""
    if kind == "masked":
        with torch.no_grad():
            given = {} if mask is None else {"attention_mask": mask}
            logits: torch.Tensor = model(input_ids=ids, **given).logits
            return logits
    return decode(model, ids, 1, mask).logits


def decode(
    model: PreTrainedModel,
    ids: torch.Tensor,
    tokens: int = TOKENS,
    mask: torch.Tensor | None = None,
    *,
    replay: bool = False,
) -> Decoded:
    """What the model's own ``generate`` adds, greedily; with ``replay`` it keeps no state between tokens. Where it
    reads no text, it is given noise to look at.
    """
    given: dict[str, Any] = {"attention_mask": torch.ones_like(ids) if mask is None else mask}
    name = model.main_input_name
    given[name] = ids if name == "input_ids" else _noise(model.config, ids.shape[0])
    if name != "input_ids":
        del given["attention_mask"]
    if replay:
        given |= {"use_cache": False, **({"use_mems": False} if "use_mems" in takes(model) else {})}
    found = model.generate(
        **given,
        max_new_tokens=tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return Decoded(found.sequences[:, -tokens:], torch.stack(found.logits, dim=1))


def _noise(config: PretrainedConfig, batch: int) -> torch.Tensor:
    """Sound as a spectrogram: [batch, bins, frames] where the config says how many bins, else [batch, frames, bins]."""
    settings = config.to_dict()
    bins: int = settings.get("num_mel_bins") or settings.get("input_feat_per_channel") or 80
    frames: int = 2 * settings.get("max_source_positions", 32)
    shape = (batch, bins, frames) if hasattr(config, "num_mel_bins") else (batch, frames, bins)
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def in_chunks(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor | None:
    """The last logits [batch, 1, vocabulary] of a prompt given in parts; None where the model cannot do that."""
    known, start = takes(model), 0
    state: dict[str, Any] = {}
    logits: torch.Tensor | None = None
    try:
        for stop in CHUNKS:
            more = {"position_ids": torch.arange(start, stop)[None]} if "position_ids" in known else {}
            with torch.no_grad():
                result = model(input_ids=ids[:, start:stop], use_cache=True, **more, **state)
            kept = ("past_key_values", "cache_params", "state", "mems")
            state = {name: result[name] for name in kept if name in known and result.get(name) is not None}
            logits, start = result.logits[:, -1:], stop
            if not state:
                return None
    except Exception:  # any model's own code runs here
        return None
    return logits


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal but for rounding."""
    return one.shape == other.shape and bool((one - other).abs().max() <= CLOSE * (1 + other.abs().max()))


def said(error: BaseException) -> str:
    """One line about a foreign error, with the place in transformers where it came from."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "transformers" in frame.filename]
    place = f" ({Path(frames[-1].filename).name})" if frames else ""
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}{place}"
