from __future__ import annotations

import pytest
import trio
import trio.testing

from torrentlm.errors import NetworkError
from torrentlm.node.services import open_services
from torrentlm.structured import single_error


class Log(list[str]):
    async def service(self, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            self.append("service ended")


def test_services_end_after_a_cancelled_body() -> None:
    log = Log()

    async def main() -> None:
        async with trio.open_nursery() as outer, open_services() as start:
            await start(log.service)
            outer.cancel_scope.cancel()
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.testing.wait_all_tasks_blocked()
                log.append("body ended")

    trio.run(main)
    assert log == ["body ended", "service ended"]


def test_a_service_that_fails_ends_the_body_and_the_others() -> None:
    log = Log()

    async def fails(task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        await trio.sleep(0.01)
        raise NetworkError("gone")

    async def main() -> None:
        with single_error(), trio.fail_after(5):
            async with open_services() as start:
                await start(log.service)
                await start(fails)
                await trio.sleep_forever()

    with pytest.raises(NetworkError, match="gone"):
        trio.run(main)
    assert log == ["service ended"]


@pytest.mark.parametrize("then_started", [False, True])
def test_cancelled_while_a_service_starts(then_started: bool) -> None:
    async def slow(task_status: trio.TaskStatus[None]) -> None:
        if then_started:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.05)
            task_status.started()
        await trio.sleep_forever()

    async def main() -> None:
        with trio.fail_after(5), trio.move_on_after(0.01):
            async with open_services() as start:
                await start(slow)

    trio.run(main)
