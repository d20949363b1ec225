"""A model's module tree without its weights: every parameter is a ghost, a view of zero pages that costs no memory.

Buffers that the model computes for itself (rotary tables and the like) are real, as ``from_pretrained`` makes them.
"""

from __future__ import annotations

import copy
import math
import mmap
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

from torrentlm.compute.custom_code import own_class, own_config, read_settings, stored
from torrentlm.errors import ArtifactError, UnsupportedModelError

MAX_LAYERS = 4096
_LAYER_COUNTS = frozenset(
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers")
)
_TOKENS = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_MAPPING_NAMES,
)
_OTHER_TASKS = (
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES,
)
_building = threading.Lock()
"""Building a model changes torch's default dtype and listens to every module's parameters: one model at a time."""


def read_config(folder: Path, allow_code: Collection[str] = ()) -> PretrainedConfig:
    """The model's config from ``folder/config.json``. Runs code that travels with the model only if its hash is one of
    ``allow_code``, see custom_code.

    Raises ArtifactError when the file is missing or broken, UnsupportedModelError when transformers cannot use it or
    code is not allowed.
    """
    if not (folder / "config.json").is_file():
        raise ArtifactError(f"{folder} has no config.json; point to the folder of a Hugging Face model.")
    settings = read_settings(folder)
    _require_bearable(settings)
    code = stored(folder, settings)
    try:
        if code is not None:
            code.require_allowed(allow_code)
            return own_config(code, folder, settings)
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ArtifactError, UnsupportedModelError):
        raise
    except OSError as error:
        raise ArtifactError(f"{folder / 'config.json'} cannot be read: {first_line(error)}") from error
    except Exception as error:  # a config's own code looks at all that it says
        raise UnsupportedModelError(
            f"transformers cannot make anything of the model's config.json: {first_line(error)}"
        ) from error


def _require_bearable(settings: Mapping[str, Any]) -> None:
    """A config may come from a stranger, and every layer is built, if only on paper."""
    texts = (settings, *(value for value in settings.values() if isinstance(value, dict)))
    for text in texts:
        for name in _LAYER_COUNTS & text.keys():
            if isinstance(text[name], int) and text[name] > MAX_LAYERS:
                raise UnsupportedModelError(
                    f"config.json says {name} = {text[name]:,}; no more than {MAX_LAYERS:,} layers are supported"
                )


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype, device: torch.device | None = None) -> PreTrainedModel:
    """The model that ``config`` describes, in eval mode, on ``device`` (CPU), with ghosts for parameters.

    Its class is the one that the config names, else the first that transformers maps the config to: a language model
    if there is one. Raises UnsupportedModelError when transformers has no such model or cannot build it.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):  # says how a checkpoint was stored; blocks hold plain tensors
        del config.quantization_config
    try:
        with _building, _parameters_on_meta():
            kind = _model_class(config)
            if not isinstance(config, kind.config_class):  # a text model's class, and a config with more around it
                config = config.get_text_config()
            model = kind._from_config(config, dtype=dtype)
    except UnsupportedModelError:
        raise
    except Exception as error:  # a config can make any model's constructor fail in any way
        raise UnsupportedModelError(
            f"transformers cannot build a model from this config: {first_line(error)}"
        ) from error
    model.eval()
    replace_parameters(model, Ghosts(device or torch.device("cpu")))
    if device is not None and device.type != "cpu":
        for module in model.modules():  # tables of positions and the like, which no block brings
            module._buffers.update(
                {key: None if kept is None else kept.to(device) for key, kept in module._buffers.items()}
            )
    return model


def _model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    found: type[PreTrainedModel] | None = next(_model_classes(config), None)
    if found is None:
        raise UnsupportedModelError(
            f"transformers knows no model of type {config.model_type}; a newer transformers may, on every holder."
        )
    return found


def _require_language_model(name: str) -> None:
    """Heads for other tasks give neither tokens nor hidden states. Raises UnsupportedModelError."""
    if any(name in _flat(mapping.values()) for mapping in _TOKENS):
        return
    if any(name in _flat(mapping.values()) for mapping in _OTHER_TASKS):
        raise UnsupportedModelError(
            f"{name} has a head for another task, which cannot be served: let config.json name its base model (or its"
            " language model) in architectures, and publish that"
        )


def _flat(names: Iterable[str | tuple[str, ...]]) -> set[str]:
    return {name for entry in names for name in ((entry,) if isinstance(entry, str) else entry)}


def _model_classes(config: PretrainedConfig) -> Iterator[Any]:
    """The classes that fit a config, the best first."""
    if (own := own_class(config)) is not None:
        yield own
    for name in config.architectures or ():
        _require_language_model(name)
        named = getattr(transformers, name, None) if name.isidentifier() else None
        if isinstance(named, type) and issubclass(named, PreTrainedModel):
            yield named
    if config.architectures and not any(hasattr(transformers, name) for name in config.architectures):
        raise UnsupportedModelError(
            f"transformers knows no class {config.architectures[0]}; another version may, or architectures in"
            " config.json is wrong"
        )
    for auto in (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForMaskedLM, AutoModel):
        if type(config) in auto._model_mapping:
            mapped = auto._model_mapping[type(config)]
            yield mapped[0] if isinstance(mapped, tuple) else mapped


class GhostProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """In its ``with``, products with ghosts are zeros, unmultiplied: analysing costs the same at any size."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ghosts = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and keeping it off costs more than most operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.compute(func, args, kwargs or {})

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What the operation gives."""
        if func.__name__ in _PRODUCTS:
            left, right = args[1:3] if func.__name__ == "addmm.default" else args[:2]
            if {left.untyped_storage()._cdata, right.untyped_storage()._cdata} & self._ghosts:
                zeros = torch.zeros((*left.shape[:-1], right.shape[-1]), dtype=left.dtype, device=left.device)
                return zeros + args[0] if func.__name__ == "addmm.default" else zeros
        return func(*args, **kwargs)


_PRODUCTS = frozenset(f"{name}.default" for name in ("mm", "bmm", "addmm", "_grouped_mm", "grouped_mm_fallback"))


class Ghosts:
    """Makes parameters that read as zeros: views of the same untouched anonymous pages, however large the model."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pages = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def __call__(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        """A ghost with the shape, dtype and ``requires_grad`` of ``parameter``."""
        shape, dtype = parameter.shape, parameter.dtype
        if self._device.type == "cpu":
            data = self._zeros(math.prod(shape) * dtype.itemsize, dtype).view(shape)
        else:  # one element, seen as many: an accelerator has no untouched pages
            data = torch.zeros((), dtype=dtype, device=self._device).expand(shape)
        return nn.Parameter(data, requires_grad=parameter.requires_grad)

    def _zeros(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        if size == 0:
            return torch.empty(0, dtype=dtype)
        if size > len(self._pages):  # ghosts made before keep the smaller mapping alive
            no_reserve = getattr(mmap, "MAP_NORESERVE", 0)
            self._pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
        return torch.frombuffer(self._pages, dtype=dtype, count=size // dtype.itemsize)


def replace_parameters(model: nn.Module, replacement: Callable[[str, nn.Parameter], nn.Parameter]) -> None:
    """Put ``replacement(first name, parameter)`` in the place of every parameter; tied parameters stay tied."""
    done: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in done:
                new = replacement(f"{prefix}.{key}" if prefix else key, parameter)
                done[id(parameter)] = done[id(new)] = new
            module._parameters[key] = done[id(parameter)]


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that this thread's modules register become meta tensors, so that initialising them costs nothing."""
    thread = threading.get_ident()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()


MODEL_ERRORS = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, NotImplementedError, MemoryError)
"""What may come out of a model's own code."""


def first_line(error: BaseException) -> str:
    """The first line of a foreign error's message, or its class when it has none: enough for one clear sentence.

    One that ends in a colon says nothing without the line behind it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[: 1 + (len(lines) > 1 and lines[0].endswith(":"))])
    return said[:300] if said else type(error).__name__
