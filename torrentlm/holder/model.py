"""A model as far as this node holds it: weights of one span, runners for it and for any part of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torrentlm.compute.device import Device
from torrentlm.compute.model import load_config, load_tokenizer
from torrentlm.compute.span import SpanRunner
from torrentlm.compute.split import Split, analyse
from torrentlm.compute.weights import Weights
from torrentlm.errors import RefusedError
from torrentlm.manifest.manifest import Manifest
from torrentlm.records import Span

MAX_RUNNERS = 8
"""Routes may use different parts of the span; each part has a runner of its own, on the same weights."""


class HeldModel:
    """Made by :meth:`load`. ``precision`` is the dtype that the weights are in here, by its safetensors name."""

    def __init__(
        self, id: bytes, manifest: Manifest, config: Any, split: Split, weights: Weights, span: Span, folder: Path
    ) -> None:
        self.id = id
        self.span = span
        self._manifest = manifest
        self._config = config
        self._split = split
        self._weights = weights
        self._folder = folder
        self._runners: OrderedDict[Span, SpanRunner] = OrderedDict()
