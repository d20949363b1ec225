"""Three real holders with a real model in one process, joined by the wire's own encoding instead of connections.

Every message is encoded and decoded again on its way; what is left out is the gateway, which has tests of its own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import trio
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from torrentlm.client.session import RemoteSession, open_session
from torrentlm.compute.device import Device
from torrentlm.config import Recipe
from torrentlm.errors import NetworkError
from torrentlm.holder.adapters import Adapters
from torrentlm.holder.memory import Memory
from torrentlm.holder.model import HeldModel
from torrentlm.holder.service import Holder
from torrentlm.publish.publish import publish
from torrentlm.publish.published import Published
from torrentlm.records import Endpoint, NodeKey, SessionId, Span
from torrentlm.route.plan import Hop
from torrentlm.structured import single_error
from torrentlm.swarm.store import Store
from torrentlm.wire.messages import Contact, Fail, Message, Opened, Output, Token, decode_message, encode_message

CLIENT = NodeKey(b"c" * 32)
VOCABULARY = 97


def save_model(folder: Path) -> PreTrainedModel:
    """A random Llama of six layers, wide enough apart that greedy tokens do not hang on rounding."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return model


def publish_model(folder: Path, data: Path) -> tuple[Published, dict[str, Path]]:
    """Publish a saved model; the paths of its block files by name."""
    with Store(data) as store:
        published = publish(Recipe("tiny", folder=folder, tokenizer=False), store)
        return published, {file.name: store.path(file.name) for file in published.manifest.files}


@dataclass
class Chain:
    """The nodes of one route and a client; also the Links of that client and the Outbox of every holder."""

    holders: dict[NodeKey, Holder] = field(default_factory=dict)
    hops: list[Hop] = field(default_factory=list)
    listeners: dict[SessionId, trio.MemorySendChannel[Message]] = field(default_factory=dict)
    sent: list[tuple[NodeKey, Message]] = field(default_factory=list)
    """Every message, with its receiver."""
    dead: set[NodeKey] = field(default_factory=set)
    died: trio.Event = field(default_factory=trio.Event)

    def outbox(self, sender: NodeKey) -> Outlet:
        return Outlet(self, sender)

    async def carry(self, sender: NodeKey, receiver: NodeKey, message: Message) -> None:
        if sender in self.dead or receiver in self.dead:
            raise NetworkError("that holder is gone")
        decoded, _ = decode_message(bytearray(b"".join(encode_message(message).parts)))
        self.sent.append((receiver, decoded))
        if receiver == CLIENT:
            assert isinstance(decoded, Opened | Token | Output | Fail)
            if (inbox := self.listeners.get(decoded.session)) is not None:
                inbox.send_nowait(decoded)
        else:
            await self.holders[receiver].handle(sender, decoded)
        await trio.lowlevel.checkpoint()

    def kill(self, node: NodeKey) -> None:
        self.dead.add(node)
        self.died.set()


@dataclass(frozen=True)
class Outlet:
    """One node's side of the chain."""

    chain: Chain
    node: NodeKey

    async def connect(self, hop: Contact) -> None:
        if hop.node in self.chain.dead:
            raise NetworkError("that holder is gone")
        await trio.lowlevel.checkpoint()

    async def send(self, node: NodeKey, message: Message, session: SessionId) -> None:
        await self.chain.carry(self.node, node, message)

    def listen(self, session: SessionId, holder: NodeKey, inbox: trio.MemorySendChannel[Message]) -> None:
        self.chain.listeners[session] = inbox

    def stop_listening(self, session: SessionId, holder: NodeKey) -> None:
        self.chain.listeners.pop(session, None)

    async def wait_lost(self, node: NodeKey) -> None:
        while node not in self.chain.dead:
            await self.chain.died.wait()
            await trio.lowlevel.checkpoint()


@asynccontextmanager
async def open_chain(
    published: Published,
    paths: dict[str, Path],
    spans: list[Span],
    *,
    kv_budget: int = 1 << 24,
    allow_code: tuple[str, ...] = (),
    adapters: Adapters | None = None,
) -> AsyncIterator[Chain]:
    """A holder for each span, in order; equal positions of two calls have equal keys."""
    chain = Chain()
    device = Device()
    async with trio.open_nursery() as nursery:
        for index, span in enumerate(spans):
            node = NodeKey(bytes([index + 1]) * 32)
            memory = Memory(1 << 30, free=lambda: 1 << 40)
            holder = Holder(node, chain.outbox(node), device, memory, kv_budget=kv_budget, adapters=adapters)
            holder.hold(
                HeldModel(
                    published.magnet.v2 or b"",
                    published.manifest,
                    published.folder,
                    paths,
                    span,
                    published.manifest.dtype,
                    allow_code=allow_code,
                )
            )
            chain.holders[node] = holder
            chain.hops.append(Hop(node, Endpoint("127.0.0.1", 1000 + index), span))
            await nursery.start(holder.run)
        yield chain
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def session_on(
    chain: Chain,
    model: bytes,
    *,
    batch: int = 1,
    max_length: int = 128,
    pads: tuple[int, ...] | None = None,
    hops: Sequence[Hop] | None = None,
    vocabulary: int = VOCABULARY,
    **options: Any,
) -> AsyncIterator[RemoteSession]:
    """A client's session through all of the chain, or through some of its hops."""
    hops = chain.hops if hops is None else hops
    with single_error():
        async with trio.open_nursery() as nursery:
            labels = [f"holder {index}" for index in range(len(hops))]
            session = await open_session(
                chain.outbox(CLIENT),
                nursery,
                model,
                hops,
                labels,
                batch=batch,
                max_length=max_length,
                vocabulary=vocabulary,
                pads=pads,
                **options,
            )
            try:
                yield session
            finally:
                await session.close()
                nursery.cancel_scope.cancel()
