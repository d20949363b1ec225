"""What a holder borrows for a session is given back, once, however the session ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import trio
from safetensors.torch import save_file

from tests.swarm.nodes import in_trio
from tests.unit.holder.chain import Chain, open_chain, publish_model, save_model, session_on
from torrentlm.client.handles import ChosenAdapter
from torrentlm.errors import RefusedError
from torrentlm.holder.adapters import Borrowed, NoAdapters
from torrentlm.publish.published import Published
from torrentlm.records import AdapterId, Span

ADAPTER = AdapterId(b"1" * 20, b"2" * 32)
SPANS = [Span(0, 2), Span(3, 4), Span(5, 7)]
LAYER = "model.layers.2.mlp.up_proj"
CHOSEN = ChosenAdapter(ADAPTER, frozenset({3}))
Model = tuple[Published, dict[str, Path]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder / "checkpoint")
    return publish_model(folder / "checkpoint", folder / "data")


class Lender:
    """One adapter for block 3, of rank 2, and who has borrowed it."""

    def __init__(self, folder: Path, out: int = 48) -> None:
        torch.manual_seed(0)
        self.path = folder / "block.safetensors"
        tensors = {"lora_A.weight": torch.randn(2, 32), "lora_B.weight": torch.randn(out, 2)}
        save_file({f"mlp.up_proj.{name}": tensor for name, tensor in tensors.items()}, self.path)
        self.asked: list[tuple[bytes, AdapterId, Span]] = []
        self.out = 0
        self.wait = trio.Event()
        self.wait.set()

    async def borrow(self, model: bytes, adapter: AdapterId, span: Span) -> Borrowed:
        self.asked.append((model, adapter, span))
        await self.wait.wait()
        self.out += 1
        return Borrowed(((self.path, (("", "model.layers.2."),)),), {LAYER: 0.5}, self._take_back)

    def _take_back(self) -> None:
        self.out -= 1


async def step(chain: Chain, model: Model, adapter: ChosenAdapter | None) -> bytes:
    async with session_on(chain, model[0].model.v2, adapter=adapter) as session:
        return bytes((await session.step([[1, 2, 3]])).data)


async def settle(reached: Callable[[], bool]) -> None:
    with trio.fail_after(5):
        while not reached():
            await trio.sleep(0.01)


@in_trio(60)
async def test_only_the_holder_of_what_it_changes_is_asked(model: Model, tmp_path: Path) -> None:
    lender = Lender(tmp_path)
    async with open_chain(*model, SPANS, adapters=lender) as chain:
        plain = await step(chain, model, None)
        assert lender.asked == []
        changed = await step(chain, model, CHOSEN)
        assert lender.asked == [(model[0].model.v2, ADAPTER, SPANS[1])]
        assert changed != plain == await step(chain, model, None)
        await settle(lambda: lender.out == 0)


@in_trio(60)
async def test_it_is_out_while_the_session_lives(model: Model, tmp_path: Path) -> None:
    lender = Lender(tmp_path)
    async with open_chain(*model, SPANS, adapters=lender) as chain:
        async with session_on(chain, model[0].model.v2, adapter=CHOSEN) as session:
            await session.step([[1, 2, 3]])
            assert lender.out == 1
        await settle(lambda: lender.out == 0)
        async with session_on(chain, model[0].model.v2, adapter=CHOSEN) as session:
            with pytest.raises(RefusedError):
                await session.step([[1] * 128] * 1, position=0)
                await session.step([[1, 2, 3]])
        await settle(lambda: lender.out == 0)


@in_trio(60)
async def test_it_comes_back_from_a_session_that_never_opened(model: Model, tmp_path: Path) -> None:
    lender = Lender(tmp_path)
    async with open_chain(*model, SPANS, adapters=lender, kv_budget=100) as chain:
        with pytest.raises(RefusedError, match="KV-cache"):
            await step(chain, model, CHOSEN)
        await settle(lambda: lender.out == 0 and len(lender.asked) == 1)


@in_trio(60)
async def test_it_comes_back_from_a_client_that_did_not_wait(model: Model, tmp_path: Path) -> None:
    lender = Lender(tmp_path)
    lender.wait = trio.Event()
    async with open_chain(*model, SPANS, adapters=lender) as chain:
        with trio.move_on_after(0.3):
            await step(chain, model, CHOSEN)
        assert len(lender.asked) == 1
        lender.wait.set()
        await trio.sleep(0.2)
        assert lender.out == 0 and not any(holder.sessions for holder in chain.holders.values())


@in_trio(60)
async def test_one_that_does_not_fit_is_refused(model: Model, tmp_path: Path) -> None:
    lender = Lender(tmp_path, out=47)
    async with open_chain(*model, SPANS, adapters=lender) as chain:
        with pytest.raises(RefusedError, match="made for another model") as error:
            await step(chain, model, CHOSEN)
        assert error.value.code == "no_adapter"
        await settle(lambda: lender.out == 0)


@pytest.mark.parametrize("adapters", [None, NoAdapters()])
def test_a_holder_that_has_not_opted_in_refuses(model: Model, adapters: NoAdapters | None) -> None:
    @in_trio(60)
    async def refused() -> None:
        async with open_chain(*model, SPANS, adapters=adapters) as chain:
            with pytest.raises(RefusedError, match="applies no adapters") as error:
                await step(chain, model, CHOSEN)
            assert error.value.code == "no_adapter" and str(error.value).startswith("holder 1: ")
            assert await step(chain, model, None)

    refused()
