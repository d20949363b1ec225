"""A quantized weight that any model's code can use: a tensor of the compute dtype to look at, small integers within
(or floating point numbers of a narrower type).

A linear layer's product with it goes to the kernels; whatever else is done with it is done with the floating point
weights, made for that one operation. Nothing may write to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from torrentlm.compute.quantization.narrow import Narrow
from torrentlm.compute.quantization.packed import Packed


class QuantizedTensor(torch.Tensor):
    """``packed`` as a tensor of ``dtype``; with ``turned`` its last two dimensions are seen the other way round."""

    packed: Packed | Narrow
    turned: bool

    @staticmethod
    def __new__(cls, packed: Packed | Narrow, dtype: torch.dtype, turned: bool = False) -> QuantizedTensor:
        shape = list(packed.shape)
        if turned:
            shape[-2:] = shape[:-3:-1]
        with torch.inference_mode(False):  # torch refuses views of an ordinary tensor that are none
            made: QuantizedTensor = torch.Tensor._make_wrapper_subclass(
                cls, shape, dtype=dtype, device=packed.device, requires_grad=False
            )
        made.packed, made.turned = packed, turned
        return made

    def dense(self) -> torch.Tensor:
        """The weights that the integers stand for."""
        weights = self.packed.dense(self.dtype)
        return weights.transpose(-1, -2) if self.turned else weights

    def __repr__(self) -> str:  # type: ignore[override]
        return f"QuantizedTensor({self.packed.kind}, {list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is functional.linear and not kwargs and type(args[0]) is not cls and args[1].dim() == 2:
                return _linear(*args)
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own stub names no defaults
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if (kept := _KEPT.get(func)) is not None and not kwargs:
            made = kept(*args)
            if made is not None:
                return made
        args, kwargs = tree_map_only(cls, cls.dense, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor``, quantized or not, on ``device``."""
    if isinstance(tensor, QuantizedTensor):
        return QuantizedTensor(tensor.packed.to(device), tensor.dtype, tensor.turned)
    return tensor.to(device)


def _linear(value: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if weight.turned or value.dtype != weight.dtype:
        return functional.linear(value, weight.dense().to(weight.dtype), bias)
    made = weight.packed.product(value)
    return made if bias is None else made.add_(bias)


def _same(weight: QuantizedTensor) -> QuantizedTensor:
    return QuantizedTensor(weight.packed, weight.dtype, weight.turned)


def _turn(weight: QuantizedTensor, *dims: int) -> QuantizedTensor | None:
    if {dim % weight.dim() for dim in dims or (0, 1)} != {weight.dim() - 2, weight.dim() - 1}:
        return None
    return QuantizedTensor(weight.packed, weight.dtype, not weight.turned)


def _select(weight: QuantizedTensor, dim: int, index: int) -> QuantizedTensor | None:
    """One expert's matrix."""
    if dim != 0 or weight.dim() < 3:
        return None
    return QuantizedTensor(weight.packed[index], weight.dtype, weight.turned)


def _picked(weight: Any, indices: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Some experts' matrices: only these become floating point."""
    if (
        not isinstance(weight, QuantizedTensor)
        or weight.dim() < 3
        or len(indices) != 1
        or indices[0] is None
        or indices[0].dtype == torch.bool
    ):
        return None
    return QuantizedTensor(weight.packed[indices[0]], weight.dtype, weight.turned).dense()


def _rows(weight: torch.Tensor, indices: torch.Tensor, *_: object) -> torch.Tensor | None:
    """An embedding's: only these become wider. Integers have their scales elsewhere."""
    if not isinstance(weight, QuantizedTensor) or not isinstance(weight.packed, Narrow) or weight.turned:
        return None
    return weight.packed[indices].dense(weight.dtype)


def _mm(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """As the linear layers compute that keep their weight as [in, out]."""
    if not isinstance(weight, QuantizedTensor) or isinstance(value, QuantizedTensor) or not weight.turned:
        return None
    return weight.packed.product(value)


def _addmm(bias: torch.Tensor, value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    made = _mm(value, weight)
    return None if made is None else made + bias


_aten = torch.ops.aten
_KEPT: dict[Any, Callable[..., torch.Tensor | None]] = {
    _aten.detach.default: _same,
    _aten.alias.default: _same,
    _aten.t.default: _turn,
    _aten.transpose.int: _turn,
    _aten.select.int: _select,
    _aten.index.Tensor: _picked,
    _aten.embedding.default: _rows,
    _aten.mm.default: _mm,
    _aten.addmm.default: _addmm,
}
"""Operations whose result is quantized again, or that need not make all of it floating point."""
