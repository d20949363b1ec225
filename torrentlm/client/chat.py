"""A chat's context: the messages so far, and how much of them the holders have cached already."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from torrentlm.client.generation import GenerationResult, Options, generate
from torrentlm.client.session import RemoteSession
from torrentlm.errors import ArtifactError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    """The messages through the model's own chat template, ready for the assistant's answer. Raises ArtifactError."""
    if tokenizer.chat_template is None:
        raise ArtifactError("this model has no chat template: use torrentlm generate with a plain prompt")
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    return [int(token) for token in ids]


class ChatContext:
    """History on this side, and the ids that the session's caches hold, so that only what is new is sent."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._cached: list[int] = []
        self.system = system
        self.messages: list[Message] = []

    def reset(self) -> None:
        """Forget the conversation; the system prompt stays."""
        self.messages.clear()

    def forget_cache(self) -> None:
        """The session is a new one: its caches are empty."""
        self._cached.clear()

    def _prompt(self, text: str) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return chat_ids(self._tokenizer, [*system, *self.messages, {"role": "user", "content": text}])

    async def ask(
        self, session: RemoteSession, text: str, options: Options, emit: Callable[[str], None], *, trims: bool = True
    ) -> GenerationResult:
        """One turn. The exchange becomes history, an answer that was cut short too (as far as it came).

        ``trims``: whether the holders can go back to any token; otherwise they go on from the last, or begin again.
        """
        started = trio.current_time()
        ids = self._prompt(text)
        shared = _common_prefix(ids[:-1], self._cached[: session.length])
        if not trims and shared < session.length:
            shared = 0
        answer: list[str] = []

        def hear(piece: str) -> None:
            answer.append(piece)
            emit(piece)

        self._cached = ids
        try:
            result = await generate(
                session,
                self._tokenizer,
                ids[shared:],
                options,
                position=shared,
                history=ids,
                started=started,
                emit=hear,
            )
            self._cached = [*ids, *result.tokens]
            return result
        finally:
            if answer:
                self.messages += [
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": "".join(answer)},
                ]


def _common_prefix(left: list[int], right: list[int]) -> int:
    count = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        count += 1
    return count
