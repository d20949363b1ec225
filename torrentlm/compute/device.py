"""A device that computes: which one it is, and a way to run forwards on it without holding up the event loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar, TypeVarTuple

import torch
import trio

from torrentlm.compute.machine import available_memory
from torrentlm.compute.processor import processor_name
from torrentlm.errors import ConfigError, OutOfMemoryError

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")

LOST = (RuntimeError, AssertionError)
"""What torch raises for a device that is not there."""


class Device:
    """One device, one forward at a time, each in a worker thread. ``torch_device`` is where its tensors live, ``label``
    what the operator calls it, ``name`` what peers are told: its kind and its maker's name for it. ``cpu:0``, ``cpu:1``
    … are parts of the processor, as if each were a device.

    ``threads`` limits the cores that one forward uses on a CPU. ``budget`` is how many bytes of its memory weights and
    KV-caches may take together, ``offload`` how many of the processor's memory blocks may take that it has no room for;
    nothing here enforces either. ``upload`` is what comes to it from there, in bytes per second, 0 if nobody measured.
    Raises ConfigError for a device that is not there.
    """

    def __init__(
        self, name: str = "cpu", threads: int | None = None, budget: int = 0, offload: int = 0, upload: float = 0.0
    ) -> None:
        try:
            self.torch_device = torch.device(name)
        except RuntimeError as error:
            raise ConfigError(f"torch knows no device {name!r}; torrentlm doctor lists those that are here.") from error
        self.label = name
        if not self.accelerates:
            self.torch_device = torch.device("cpu")  # where tensors say that they are, whatever the number
        self.budget = budget
        self.offload = offload
        self.upload = upload
        self.check()
        if threads is not None and self.torch_device.type == "cpu":
            torch.set_num_threads(threads)
        self.name = self._name()  # a device that is lost cannot be asked any more
        self._limiter = trio.CapacityLimiter(1)

    @property
    def accelerates(self) -> bool:
        return self.torch_device.type != "cpu"

    def check(self) -> None:
        """Raise ConfigError if the device is not there, or not any more: a driver may lose one while it runs."""
        try:
            torch.ones(1, device=self.torch_device).sum().item()
        except LOST as error:
            raise self._gone() from error

    def _gone(self) -> ConfigError:
        return ConfigError(
            f"The device {self.torch_device} is not usable here, or not any more; torrentlm doctor says what is, and"
            " --devices chooses."
        )

    def _name(self) -> str:
        if self.torch_device.type == "cpu":
            return f"cpu ({processor_name()}, {torch.get_num_threads()} threads)"
        if self.torch_device.type == "cuda":
            kind = "cuda" if torch.version.hip is None else "rocm"
            return f"{kind} ({torch.cuda.get_device_name(self.torch_device)})"
        return self.torch_device.type

    def free_memory(self) -> int:
        """Bytes that the device could still give, to us or to other programs. Raises ConfigError as ``check``."""
        if self.torch_device.type != "cuda":
            return available_memory()
        try:
            free, _ = torch.cuda.mem_get_info(self.torch_device)
            kept = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(self.torch_device)
        except LOST as error:
            raise self._gone() from error
        return int(free + kept)

    def give_back(self) -> None:
        """What torch keeps for later goes back to the driver, for other programs or for larger pieces of ours; nothing
        from a device that is lost."""
        with suppress(*LOST):
            if self.torch_device.type == "cuda":
                torch.cuda.empty_cache()
            elif self.torch_device.type == "mps":
                torch.mps.empty_cache()

    async def run(self, function: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """Call ``function(*arguments)`` in a worker thread when it is its turn.

        While it waits for its turn it can be cancelled. Once it runs it cannot: a forward is never left half-way, so
        the caller's cancellation takes effect when it is done.
        """
        return await trio.to_thread.run_sync(function, *arguments, limiter=self._limiter, abandon_on_cancel=False)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Translate what torch and Python say when there is no memory to OutOfMemoryError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise OutOfMemoryError from error


def _is_out_of_memory(error: Exception) -> bool:
    """torch has a class for it on accelerators, and on the processor only this sentence."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
