"""The part of a node that computes: its device, its holder, and how blocks get into them.

Importing this imports torch and transformers, which takes seconds; nodes that only seed or chat never do.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import trio

from torrentlm.compute.device import Device
from torrentlm.config import NodeConfig
from torrentlm.holder.adapters import Adapters
from torrentlm.holder.model import HeldModel
from torrentlm.holder.service import Holder, Outbox
from torrentlm.node.membership import Membership
from torrentlm.node.memory import computing_dtype, kv_budget
from torrentlm.node.parts import Say
from torrentlm.node.recheck import recheck
from torrentlm.records import NodeKey, Span

MAX_DEVICE_NAME = 40


class Computing:
    """One device and the holder that uses it. ``changed`` is called whenever a session opens or ends."""

    def __init__(
        self,
        key: NodeKey,
        config: NodeConfig,
        outbox: Outbox,
        changed: Callable[[], None],
        adapters: Adapters,
        say: Say,
    ) -> None:
        self.device = Device(threads=config.threads)
        self.holder = Holder(
            key,
            outbox,
            self.device,
            kv_budget=kv_budget(config),
            max_lease=config.lease,
            adapters=adapters if config.adapters else None,
            changed=changed,
        )
        self._config = config
        self._say = say

    async def load(self, membership: Membership, span: Span) -> None:
        """Load blocks whose files are here, check one of them, serve them, and tell everybody.

        Raises ArtifactError, UnsupportedModelError, StorageError.
        """
        model = await trio.to_thread.run_sync(
            HeldModel,
            membership.id,
            membership.manifest,
            membership.folder,
            membership.files.paths(span),
            span,
            computing_dtype(membership.manifest, self._config),
            self.device.torch_device,
            self._config.allow_code,
        )
        if self._config.recheck:
            await recheck(model, membership.sidecars, self._say)
        # What was loaded stays: the collector need not walk through it again and again between tokens.
        gc.collect()
        gc.freeze()
        self.holder.hold(model)
        membership.peers.publish(
            resident=(span,),
            claimed=(),
            precision=model.precision,
            device=self.device.name[:MAX_DEVICE_NAME],
            adapters=self._config.adapters,
        )
