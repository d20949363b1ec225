"""The order in which a node ends: first what uses the network, then the network."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

import trio


class Service(Protocol):
    """Runs until cancelled; says ``task_status.started()`` when it can be used."""

    async def __call__(self, *, task_status: trio.TaskStatus[None]) -> None: ...


class Start(Protocol):
    """Starts a service and returns when it can be used."""

    async def __call__(self, service: Service) -> None: ...


class _ShieldWhenStarted:
    """Passes ``started`` on, and keeps later cancellation from outside away from the service.

    Only if it has not come yet: a start that is being cancelled waits for its task's end.
    """

    def __init__(self, status: trio.TaskStatus[None], scope: trio.CancelScope) -> None:
        self._status = status
        self._scope = scope

    def started(self, value: None = None) -> None:
        self._scope.shield = trio.current_effective_deadline() > -math.inf
        self._status.started(value)


@asynccontextmanager
async def open_services() -> AsyncIterator[Start]:
    """A nursery for what the body stands on: when everything is cancelled, its tasks go on until the body has ended.

    A body that is in a thread when it is cancelled comes back to services that are still there.
    """
    scopes: list[trio.CancelScope] = []

    async def run(service: Service, task_status: trio.TaskStatus[None]) -> None:
        with trio.CancelScope() as scope:
            scopes.append(scope)
            await service(task_status=_ShieldWhenStarted(task_status, scope))

    async def start(service: Service) -> None:
        await nursery.start(run, service)

    async with trio.open_nursery() as nursery:
        try:
            yield start
        finally:
            for scope in scopes:
                scope.cancel()
