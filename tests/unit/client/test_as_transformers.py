"""transformers' own generate() on the swarm, against the same generate() on the whole model: three real holders."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trio
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from tests.unit.holder.chain import CLIENT, VOCABULARY, Chain, open_chain, publish_model
from torrentlm.api import Model
from torrentlm.client.as_transformers import SwarmForCausalLM
from torrentlm.client.model import StepSession
from torrentlm.client.session import RemoteSession, open_session
from torrentlm.errors import ArtifactError, LocalProtocolError, RefusedError, UnsupportedModelError
from torrentlm.portal import Portal
from torrentlm.records import Span

SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 128},
}
THIRDS = [Span(0, 2), Span(3, 4), Span(5, 7)]
PROMPT = torch.tensor([[5, 17, 3, 80, 41, 17, 3]])
BATCH = torch.tensor([[5, 17, 3, 80, 41, 17, 3], [0, 0, 0, 9, 60, 2, 33]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]])


@dataclass
class World:
    """The same random model whole and behind three holders."""

    whole: PreTrainedModel
    swarm: SwarmForCausalLM
    chain: Chain
    folder: Path

    @property
    def sessions(self) -> int:
        """How many the busiest holder still has, after a moment for what is on its way."""
        deadline = time.monotonic() + 5
        while (count := max(holder.sessions for holder in self.chain.holders.values())) and time.monotonic() < deadline:
            time.sleep(0.01)
        return count

    def both(self, **how: Any) -> tuple[Any, Any]:
        """generate() of the swarm and of the whole model, each from the same state of torch's generator."""
        results = []
        for model in (self.swarm, self.whole):
            torch.manual_seed(11)
            results.append(model.generate(**{"max_new_tokens": 20, "pad_token_id": 0, **how}))
        return results[0], results[1]


@dataclass
class ChainClient:
    """As much of a ModelClient as stepping needs."""

    chain: Chain
    id: bytes
    nursery: trio.Nursery
    vocabulary: int = VOCABULARY
    tokenizer: None = None

    def steps(self, batch: int, max_length: int, pads: tuple[int, ...], adapter: str | None = None) -> StepSession:
        return StepSession(self, batch, max_length, pads, adapter)  # type: ignore[arg-type]

    async def open(
        self, *, batch: int, max_length: int, pads: tuple[int, ...], adapter: str | None = None
    ) -> RemoteSession:
        return await open_session(
            self.chain.outbox(CLIENT),
            self.nursery,
            self.id,
            self.chain.hops,
            [f"holder {index}" for index in range(len(self.chain.hops))],
            batch=batch,
            max_length=max_length,
            vocabulary=self.vocabulary,
            pads=pads,
        )


def save(kind: str, folder: Path) -> PreTrainedModel:
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=7, **SIZES[kind])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=list(SIZES))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp(request.param)
    whole = save(request.param, folder / "checkpoint")
    published, paths = publish_model(folder / "checkpoint", folder / "data")

    @asynccontextmanager
    async def client() -> AsyncIterator[SimpleNamespace]:
        async with open_chain(published, paths, THIRDS) as chain, trio.open_nursery() as nursery:
            model = ChainClient(chain, published.magnet.v2 or b"", nursery)
            yield SimpleNamespace(model=model, membership=SimpleNamespace(folder=published.folder))
            nursery.cancel_scope.cancel()

    portal = Portal(client)
    with Model(portal) as model, model.as_transformers() as swarm:  # type: ignore[arg-type]
        yield World(whole, swarm, portal.value.model.chain, published.folder)


def ids(found: Any) -> list[list[int]]:
    return [[int(token) for token in row] for row in found]


def test_greedy_tokens_and_logits_are_the_whole_models(world: World) -> None:
    ours, theirs = world.both(inputs=PROMPT, return_dict_in_generate=True, output_logits=True, output_scores=True)
    assert ids(ours.sequences) == ids(theirs.sequences)
    assert len(ours.logits) == len(theirs.logits) == len(ours.scores)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=1e-4, atol=1e-4)
    assert world.sessions == 0


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 4},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5, "early_stopping": True},
        {"num_beams": 3, "do_sample": True, "temperature": 1.5},
        {"num_beams": 2, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
        {"do_sample": True, "typical_p": 0.8, "epsilon_cutoff": 0.01, "num_return_sequences": 3},
        {"min_new_tokens": 12, "bad_words_ids": [[3], [41, 17]], "exponential_decay_length_penalty": (5, 1.1)},
        {"guidance_scale": 1.5},
        {"prefill_chunk_size": 3},
        {"use_cache": False, "max_new_tokens": 6},
        {"max_length": 15, "max_new_tokens": None},
        {"generation_config": GenerationConfig(num_beams=2, max_new_tokens=9, eos_token_id=None, pad_token_id=0)},
    ],
    ids=lambda how: " ".join(how) if "generation_config" not in how else "config",
)
@pytest.mark.parametrize("padded", [False, True], ids=["one", "left-padded"])
def test_every_way_to_generate_gives_the_whole_models_tokens(world: World, how: dict[str, Any], padded: bool) -> None:
    inputs = {"inputs": BATCH, "attention_mask": MASK} if padded else {"inputs": PROMPT}
    if "generation_config" in how:
        ours, theirs = (model.generate(**inputs, **how) for model in (world.swarm, world.whole))
    else:
        ours, theirs = world.both(**inputs, **how)
    assert ids(ours) == ids(theirs)
    assert ours.shape[1] > PROMPT.shape[1]
    assert world.sessions == 0


def test_beam_scores_and_indices_are_the_whole_models(world: World) -> None:
    ours, theirs = world.both(
        inputs=BATCH, attention_mask=MASK, num_beams=4, return_dict_in_generate=True, output_scores=True
    )
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, rtol=1e-4, atol=1e-4)
    assert ids(ours.beam_indices) == ids(theirs.beam_indices)


def test_guesses_of_a_small_model_or_of_the_prompt_are_rolled_back(world: World) -> None:
    """Assisted decoding: several tokens a step, and what was guessed wrong is cropped off the holders' caches."""
    small = save("llama", world.folder.parent / "assistant")
    small.generation_config.pad_token_id = 0
    for how in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": small}):
        ours, theirs = world.both(inputs=PROMPT, eos_token_id=None, **how)
        plain = world.whole.generate(PROMPT, max_new_tokens=20, pad_token_id=0, eos_token_id=None)
        assert ids(ours) == ids(theirs) == ids(plain)
    assert world.sessions == 0


class Favour(LogitsProcessor):
    """Makes token 50 come at every third place; sees the ids so far."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] % 3 == 0:
            scores[:, 50] = scores.max() + 1
        return scores


class StopAfter(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self._length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self._length)


def test_processors_and_criteria_of_ones_own(world: World) -> None:
    ours, theirs = world.both(
        inputs=PROMPT,
        eos_token_id=None,
        logits_processor=LogitsProcessorList([Favour()]),
        stopping_criteria=StoppingCriteriaList([StopAfter(14), MaxTimeCriteria(60)]),
    )
    assert ids(ours) == ids(theirs)
    assert ours.shape[1] == 14 and ours[0, 9] == ours[0, 12] == 50


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False
        self.came = threading.Event()

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()
        if len(self.tokens) > PROMPT.shape[1] + 3:
            self.came.set()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_hears_each_token(world: World) -> None:
    streamer = Collect()
    found = world.swarm.generate(PROMPT, max_new_tokens=10, streamer=streamer, pad_token_id=0)
    assert streamer.tokens == found[0].tolist() and streamer.ended


def test_a_streamer_that_raises_leaves_nothing_open(world: World) -> None:
    class Tired(Collect):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if self.came.is_set():
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.swarm.generate(PROMPT, max_new_tokens=100, streamer=Tired(), pad_token_id=0)
    assert world.sessions == 0


def test_closing_ends_a_generation_in_another_thread(world: World) -> None:
    streamer, errors = Collect(), []

    def work() -> None:
        try:
            world.swarm.generate(PROMPT, max_new_tokens=110, eos_token_id=None, pad_token_id=0, streamer=streamer)
        except LocalProtocolError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert streamer.came.wait(30)
    world.swarm.close()
    thread.join(10)
    assert not thread.is_alive()
    assert len(errors) == 1 and len(streamer.tokens) < PROMPT.shape[1] + 110
    assert world.sessions == 0
    assert world.swarm.generate(PROMPT, max_new_tokens=2, pad_token_id=0).shape == (1, 9)


def test_two_threads_generate_at_once(world: World) -> None:
    found: dict[int, Any] = {}

    def work(beams: int) -> None:
        found[beams] = world.swarm.generate(PROMPT, num_beams=beams, max_new_tokens=16, pad_token_id=0)

    threads = [threading.Thread(target=work, args=(beams,)) for beams in (1, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for beams, ours in found.items():
        theirs = world.whole.generate(PROMPT, num_beams=beams, max_new_tokens=16, pad_token_id=0)
        assert ids(ours) == ids(theirs)
    assert len(found) == 2


def test_a_cache_of_ones_own_goes_on_and_back(world: World) -> None:
    """A second turn on the first one's cache feeds only what is new; crop and reorder are the whole model's too."""
    greedy = {"pad_token_id": 0, "eos_token_id": None}
    with world.swarm.new_cache(max_length=64) as cache:
        first = world.swarm.generate(PROMPT, max_new_tokens=8, past_key_values=cache, **greedy)
        assert cache.get_seq_length() == 14
        longer = torch.cat([first, torch.tensor([[4, 44]])], dim=1)
        second = world.swarm.generate(longer, max_new_tokens=8, past_key_values=cache, **greedy)
        assert ids(second) == ids(world.whole.generate(longer, max_new_tokens=8, **greedy))
        cache.crop(-(cache.get_seq_length() - 5))
        again = world.swarm(PROMPT[:, 5:], past_key_values=cache, logits_to_keep=1).logits
        torch.testing.assert_close(again, world.whole(PROMPT).logits[:, -1:], rtol=1e-4, atol=1e-4)
        cache.reset()
        assert world.swarm(BATCH, attention_mask=MASK, past_key_values=cache).logits.shape == (2, 7, VOCABULARY)
        cache.reorder_cache(torch.tensor([1, 1]))
        cache.reorder_cache(torch.tensor([1, 0]))
        mask = torch.cat([MASK[[1, 1]], torch.ones(2, 1, dtype=torch.long)], dim=1)
        step = world.swarm(torch.tensor([[8], [8]]), attention_mask=mask, past_key_values=cache).logits
        whole = world.whole(
            torch.cat([BATCH[1:], torch.tensor([[8]])], dim=1),
            attention_mask=mask[:1],
            position_ids=(mask[:1].cumsum(-1) - 1).clamp(min=0),
        ).logits
        torch.testing.assert_close(step, whole[:, -1:].expand(2, -1, -1), rtol=1e-4, atol=1e-4)
    assert world.sessions == 0
    with pytest.raises(LocalProtocolError, match="this cache is closed"):
        world.swarm(PROMPT, past_key_values=cache)


def test_a_returned_cache_is_closed_unless_it_was_ones_own(world: World) -> None:
    found = world.swarm.generate(PROMPT, max_new_tokens=4, return_dict_in_generate=True, pad_token_id=0)
    with pytest.raises(LocalProtocolError, match=r"pass it as past_key_values"):
        world.swarm.generate(found.sequences, max_new_tokens=4, past_key_values=found.past_key_values, pad_token_id=0)


def test_forward_alone_is_a_whole_models_forward(world: World) -> None:
    with torch.no_grad():
        whole = world.whole(BATCH, attention_mask=MASK).logits
    ours = world.swarm(BATCH, attention_mask=MASK)
    real = MASK.bool()
    if world.whole.config.model_type == "llama":  # with positions of its own making only rotary ones are relative
        torch.testing.assert_close(ours.logits[real], whole[real], rtol=1e-4, atol=1e-4)
    assert ours.past_key_values is None
    torch.testing.assert_close(ours.logits[:1], world.swarm(PROMPT).logits, rtol=1e-4, atol=1e-4)
    assert world.swarm(PROMPT, logits_to_keep=3).logits.shape == (1, 3, VOCABULARY)
    assert world.swarm(PROMPT, return_dict=False)[0].shape == (1, 7, VOCABULARY)
    assert world.sessions == 0


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "pass input_ids"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions looks into the model"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states looks into"),
        ({"assistant_early_exit": 2}, "assistant_early_exit looks into"),
        ({"cache_implementation": "static"}, "leave cache_implementation out"),
        ({"custom_generate": "someone/somewhere", "trust_remote_code": True}, "no code from a hub"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 0]])}, "padding_side='left'"),
        ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1]])}, "padding_side='left'"),
        ({"attention_mask": torch.zeros(1, 7, dtype=torch.long)}, "hides a whole row"),
        ({"position_ids": torch.arange(7)[None] + 1}, "leave them out"),
        ({"token_type_ids": torch.zeros(1, 7, dtype=torch.long)}, "token_type_ids"),
        ({"num_beams": 300}, "256 rows"),
        ({"past_key_values": object()}, "new_cache"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_one_clear_sentence(world: World, how: dict[str, Any], says: str) -> None:
    given = how if "inputs_embeds" in how else {"inputs": PROMPT, **how}
    with pytest.raises((ValueError, TypeError), match=says) as error:
        world.swarm.generate(**{"max_new_tokens": 4, "pad_token_id": 0, **given})
    assert "\n" not in str(error.value)
    assert world.sessions == 0


def test_a_text_longer_than_the_model_is_refused(world: World) -> None:
    limit = world.whole.config.max_position_embeddings
    with pytest.raises(RefusedError, match=f"this model ends at {limit}"):
        world.swarm.generate(PROMPT, max_new_tokens=limit, pad_token_id=0)


def test_a_batch_that_does_not_fit_the_cache(world: World) -> None:
    with world.swarm.new_cache(16) as cache:
        world.swarm(PROMPT, past_key_values=cache)
        with pytest.raises(ValueError, match="1 rows, not 2"):
            world.swarm(BATCH, past_key_values=cache)
        with pytest.raises(ValueError, match="cannot grow in rows"):
            cache.batch_repeat_interleave(2)
        with pytest.raises(ValueError, match="from -7 to 0"):
            cache.crop(-8)
        with pytest.raises(RefusedError, match="reach 21 tokens"):
            world.swarm(torch.cat([PROMPT, PROMPT], 1), past_key_values=cache)


def test_generation_settings_are_the_model_torrents(world: World, tmp_path: Path) -> None:
    assert world.swarm.generation_config.eos_token_id == 7
    assert type(world.swarm.config) is type(world.whole.config)
    config = (world.folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"eos_token_id": 7', '"eos_token_id": 9, "do_sample": true'))

    def load() -> SwarmForCausalLM:
        return SwarmForCausalLM.load(tmp_path, None, lambda *args: pytest.fail("opened"))  # type: ignore[arg-type]

    assert load().generation_config.eos_token_id == 9  # an old checkpoint: config.json alone
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ArtifactError, match="generation settings cannot be read"):
        load()


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="as_transformers"):
        SwarmForCausalLM.load(tmp_path, None, lambda *args: pytest.fail("opened"))  # type: ignore[arg-type]
