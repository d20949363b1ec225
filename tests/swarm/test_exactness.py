"""The real model through three holder processes, against transformers in one process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer

import torrentlm
from tests.e2e.processes import Seed
from tests.swarm.smollm2 import SPANS, Reference, Swarm, load_reference, three_holders
from torrentlm.client.as_transformers import SwarmForCausalLM
from torrentlm.client.options import How
from torrentlm.compute.sampling import Sampler
from torrentlm.records import Sampling

PROMPTS = (
    "The sky is blue because",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village by the sea, there lived",
    "To bake bread, first",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
)


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    with three_holders(tmp_path_factory.mktemp("smollm2")) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def model(swarm: Swarm) -> Iterator[torrentlm.Model]:
    with swarm.connect() as model:
        yield model


@pytest.fixture(scope="module")
def reference() -> Reference:
    return load_reference()


@pytest.fixture(scope="module")
def generator(model: torrentlm.Model) -> Iterator[SwarmForCausalLM]:
    with model.as_transformers() as generator:
        yield generator


def test_each_holder_has_its_third_and_no_more(swarm: Swarm) -> None:
    assert [ready["blocks"] for ready in swarm.ready] == [list(range(11)), list(range(11, 21)), list(range(21, 32))]
    # The head needs the embedding, which is all that the stem is.
    assert [ready["held"] for ready in swarm.ready] == [[*range(11)], [*range(11, 21)], [0, *range(21, 32)]]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_64_greedy_tokens_are_transformers_own(model: torrentlm.Model, reference: Reference, prompt: str) -> None:
    model.generate(prompt, max_new_tokens=64)
    assert model.last is not None
    expected = reference.greedy(prompt, 64)
    assert len(expected) == 64
    assert list(model.last.tokens) == expected
    assert [f"{hop.first}-{hop.last}" for hop in model.last.route] == list(SPANS)


def test_warped_probabilities_are_transformers_at_every_step(model: torrentlm.Model, reference: Reference) -> None:
    """The swarm's logits through our sampler's warpers, and the whole model's through transformers' own processors."""
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    sampling = Sampling(temperature=0.8, top_k=50, top_p=0.9, min_p=0.02, repetition_penalty=1.15, seed=5)
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.15),
            TemperatureLogitsWarper(0.8),
            TopKLogitsWarper(50),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.02),
        ]
    )
    ids = reference.ids(PROMPTS[2])
    model.generate(
        PROMPTS[2],
        max_new_tokens=24,
        temperature=0.8,
        top_k=50,
        top_p=0.9,
        min_p=0.02,
        repetition_penalty=1.15,
        seed=5,
    )
    assert model.last is not None
    drawn = list(model.last.tokens)
    sampler = Sampler(sampling)
    sampler.seen([ids])
    text = list(ids)
    with model.session(max_length=len(ids) + 24) as session:
        new = ids
        for token in drawn:
            logits = session.step([new], last_only=True)[:, -1]
            ours = sampler.scores(logits).softmax(-1)
            theirs = processors(torch.tensor([text]), reference.logits([text])[:, -1]).softmax(-1)
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
            assert sampler.pick(logits, len(text)) == [token]
            text.append(token)
            new = [token]


def test_a_seed_gives_the_same_text_again_and_another_seed_another(model: torrentlm.Model) -> None:
    def draw(seed: int) -> tuple[int, ...]:
        model.generate(PROMPTS[0], max_new_tokens=24, temperature=1.0, seed=seed)
        assert model.last is not None
        return model.last.tokens

    assert draw(1) == draw(1) != draw(2)


def test_a_seed_gives_the_same_text_on_another_route(model: torrentlm.Model, swarm: Swarm, tmp_path: Path) -> None:
    how: How = {"max_new_tokens": 24, "temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 7}
    text = model.generate(PROMPTS[0], **how)
    assert model.last is not None
    assert [f"{hop.first}-{hop.last}" for hop in model.last.route] == list(SPANS)
    with Seed(swarm.magnet, tmp_path / "all", "--blocks", "0-31") as alone:
        magnet = alone.wait_for("ready")["magnet"]
        with torrentlm.connect(magnet, data=tmp_path / "client", port=0, dht_bootstrap=["none"]) as other:
            assert other.generate(PROMPTS[0], **how) == text
            assert other.last is not None
            assert [(hop.first, hop.last) for hop in other.last.route] == [(0, 31)]


def test_steps_of_mixed_sizes_none_among_them(model: torrentlm.Model, reference: Reference) -> None:
    ids = reference.ids(PROMPTS[2])
    with model.session(max_length=64) as session:
        parts = [session.step([part]) for part in (ids[:5], [], ids[5:6], ids[6:])]
    assert [part.shape[1] for part in parts] == [5, 0, 1, len(ids) - 6]
    torch.testing.assert_close(torch.cat(parts, 1), reference.logits([ids]), rtol=1e-3, atol=1e-3)


def test_back_to_position_two_is_like_a_fresh_run(model: torrentlm.Model, reference: Reference) -> None:
    ids = reference.ids(PROMPTS[3])
    other = reference.ids(PROMPTS[0])[:4]
    with model.session(max_length=64) as session:
        session.step([ids])
        rolled_back = session.step([other], position=2)
        assert session.length == 6
    with model.session(max_length=64) as session:
        session.step([ids[:2]])
        fresh = session.step([other])
    torch.testing.assert_close(rolled_back, fresh, rtol=1e-4, atol=1e-4)
    assert torch.equal(rolled_back.argmax(-1), fresh.argmax(-1))


def test_a_left_padded_batch_of_two(model: torrentlm.Model, reference: Reference) -> None:
    long, short = reference.ids(PROMPTS[2]), reference.ids(PROMPTS[0])
    pad = len(long) - len(short)
    rows = [long, [0] * pad + short]
    with model.session(batch=2, max_length=64, pads=(0, pad)) as session:
        tokens: list[list[int]] = [[], []]
        logits = session.step(rows, last_only=True)
        for _ in range(16):
            picked = logits[:, -1].argmax(-1).tolist()
            for row, token in enumerate(picked):
                tokens[row].append(token)
            logits = session.step([[token] for token in picked], last_only=True)
    ids = torch.tensor(rows)
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    whole = reference.model.generate(
        ids, attention_mask=mask, max_new_tokens=16, do_sample=False, repetition_penalty=1.0, eos_token_id=None
    )
    assert tokens == whole[:, len(long) :].tolist()


def test_a_stop_string_ends_the_answer_before_it(model: torrentlm.Model) -> None:
    whole = model.generate(PROMPTS[0], max_new_tokens=64)
    assert "sunlight" in whole
    cut = model.generate(PROMPTS[0], max_new_tokens=64, stop=["sunlight"])
    assert model.last is not None and model.last.finish == "stop_string"
    assert cut == whole[: whole.index("sunlight")]
    assert len(model.last.tokens) < 64


def test_a_text_too_long_is_refused(model: torrentlm.Model) -> None:
    with pytest.raises(torrentlm.RefusedError, match="this model ends at 8192") as refused:
        model.generate("Hello", max_new_tokens=9000)
    assert refused.value.code == "max_length"
    with (
        model.session(max_length=4) as session,
        pytest.raises(torrentlm.RefusedError, match="would reach 5 tokens") as refused,
    ):
        session.step([[1, 2, 3, 4, 5]])
    assert refused.value.code == "max_length"


def test_a_chat_goes_on_from_what_the_holders_have(model: torrentlm.Model, reference: Reference) -> None:
    with model.chat() as chat:
        first = "".join(chat.send("What is the capital of France?", max_new_tokens=24))
        assert "Paris" in first
        "".join(chat.send("And of Italy?", max_new_tokens=16))
        second_result = model.last
    assert second_result is not None
    messages = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And of Italy?"},
    ]
    ids = reference.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    tensor = torch.tensor([ids])
    whole = reference.model.generate(
        tensor, attention_mask=torch.ones_like(tensor), max_new_tokens=16, do_sample=False, repetition_penalty=1.0
    )
    assert list(second_result.tokens) == whole[0, len(ids) :].tolist()


@pytest.mark.parametrize("prompt", [PROMPTS[1], PROMPTS[4]])
@pytest.mark.parametrize("beams", [1, 4])
def test_transformers_own_generate_gives_its_own_tokens(
    generator: SwarmForCausalLM, reference: Reference, prompt: str, beams: int
) -> None:
    ids = torch.tensor([reference.ids(prompt)])
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "num_beams": beams, "do_sample": False}
    ours, theirs = (model.generate(ids, **how) for model in (generator, reference.model))
    assert ours.tolist() == theirs.tolist()
    assert ours.shape[1] > ids.shape[1] + 5


def test_four_beams_for_each_of_a_left_padded_batch(generator: SwarmForCausalLM, reference: Reference) -> None:
    tokenizer = generator.tokenizer
    batch = tokenizer(list(PROMPTS[:3]), return_tensors="pt", padding=True, padding_side="left")
    assert not batch["attention_mask"].all()
    how: dict[str, Any] = {
        "max_new_tokens": 16,
        "num_beams": 4,
        "num_return_sequences": 2,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    ours, theirs = (model.generate(**batch, **how) for model in (generator, reference.model))
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0.6},
        {"temperature": 1.4, "top_k": 40},
        {"temperature": 1.0, "top_p": 0.85},
        {"temperature": 1.2, "min_p": 0.08},
        {"temperature": 1.0, "repetition_penalty": 1.3},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.15},
    ],
    ids=" ".join,
)
def test_what_the_head_draws_from_is_what_transformers_draws_from(
    generator: SwarmForCausalLM, reference: Reference, how: dict[str, Any]
) -> None:
    """The head's sampler on the swarm's logits, and generate()'s own warpers on the same and on the whole model's."""
    ids = torch.tensor([reference.ids(PROMPTS[2])])
    off = {"top_k": 0, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0}
    asked = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 10,
        "do_sample": True,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        **off,
        **how,
    }
    results = []
    for model in (generator, reference.model):
        torch.manual_seed(4)
        results.append(model.generate(ids, **asked))
    ours, theirs = results
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    sampler = Sampler(Sampling(seed=1, **how))
    for step, (logits, scores, whole) in enumerate(zip(ours.logits, ours.scores, theirs.scores, strict=True)):
        sampler.seen(
            ours.sequences[:, : ids.shape[1]] if step == 0 else ours.sequences[:, ids.shape[1] + step - 1, None]
        )
        head = sampler.scores(logits)
        assert torch.equal(head.isfinite(), scores.isfinite())
        torch.testing.assert_close(head.softmax(-1), scores.softmax(-1), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(head.softmax(-1), whole.softmax(-1), rtol=1e-3, atol=1e-5)


def test_text_streams_from_generate_in_a_thread(generator: SwarmForCausalLM, reference: Reference) -> None:
    tokenizer = generator.tokenizer
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    thread = threading.Thread(
        target=generator.generate, kwargs={**inputs, "max_new_tokens": 16, "do_sample": False, "streamer": streamer}
    )
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert len(pieces) > 3
    assert "".join(pieces) == tokenizer.decode(reference.greedy(PROMPTS[0], 16))
