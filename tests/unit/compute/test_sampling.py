"""The probabilities are transformers' own; the draw depends on seed, position and row alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.unit.compute.checkpoints import tiny
from torrentlm.compute.border import pack
from torrentlm.compute.sampling import Sampler, gumbel
from torrentlm.errors import RefusedError
from torrentlm.records import Sampling

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.9, "repetition_penalty": 1.4},
    {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1},
]
PROMPT = torch.tensor([[0, 0, 5, 9, 14], [7, 8, 5, 9, 14]])


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_scores_are_those_that_generate_samples_from(model: PreTrainedModel, settings: dict[str, Any]) -> None:
    torch.manual_seed(3)
    result = model.generate(
        PROMPT,
        attention_mask=(PROMPT > 0).long(),
        max_new_tokens=12,
        do_sample=True,
        pad_token_id=0,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        **{"top_k": 0} | settings,
    )
    sampler = Sampler(Sampling(**settings), batch=2, pads=(2, 0))
    for step, (logits, scores) in enumerate(zip(result.logits, result.scores, strict=True)):
        sampler.seen(PROMPT if step == 0 else result.sequences[:, 4 + step : 5 + step])
        assert torch.equal(sampler.scores(logits), scores)


def test_greedy_is_argmax_after_the_penalty(model: PreTrainedModel) -> None:
    result = model.generate(
        PROMPT[1:],
        attention_mask=torch.ones(1, 5, dtype=torch.long),
        max_new_tokens=12,
        do_sample=False,
        repetition_penalty=1.5,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    sampler = Sampler(Sampling(repetition_penalty=1.5))
    sampler.seen(pack(PROMPT[1:].int()))
    picked = [sampler.pick(logits, 5 + step)[0] for step, logits in enumerate(result.logits)]
    assert picked == result.sequences[0, 5:].tolist()


def test_a_draw_is_a_function_of_seed_position_and_row() -> None:
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature=1.5, seed=11)
    together = Sampler(sampling, batch=3).pick(logits, 40)
    sampler = Sampler(sampling, batch=3)
    for position in (1, 2, 39):
        sampler.pick(logits, position)
    assert sampler.pick(logits.unsqueeze(1), 40) == together  # whatever came before, and in either shape
    assert Sampler(sampling).pick(logits[:1], 40) == together[:1]  # whatever else is in the batch
    draws = {
        tuple(Sampler(Sampling(temperature=1.5, seed=seed), batch=3).pick(logits, at))
        for seed in (1, 2)
        for at in (40, 41)
    }
    assert len(draws) == 4


def test_noise_is_the_same_everywhere_and_forever() -> None:
    """A second implementation must get these numbers; changing them changes what people's seeds give."""
    noise = gumbel(7, 3, 0, torch.tensor([0, 1, 49151]))
    assert noise.tolist() == pytest.approx(NOISE, abs=1e-12)
    subset = gumbel(7, 3, 0, torch.tensor([49151]))
    assert subset[0] == noise[2]


NOISE = [-0.6302217705702385, 1.1653575158287748, 0.16587168615244213]


def test_draws_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    sampler = Sampler(Sampling(temperature=1.0, seed=5))
    draws = 4000
    counts = torch.zeros(5)
    for position in range(draws):
        counts[sampler.pick(probabilities.log()[None], position)[0]] += 1
    expected = probabilities * draws
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # chi-square, 4 degrees of freedom, one in a thousand


def test_noise_is_uniform_over_tokens_and_positions() -> None:
    for seed, position in itertools.product(range(3), range(3)):
        uniform = (-(-gumbel(seed, position, 0, torch.arange(20000))).exp()).exp()
        assert abs(uniform.mean() - 0.5) < 0.01
        buckets = torch.histc(uniform, bins=20, min=0, max=1)
        assert ((buckets - 1000) ** 2 / 1000).sum() < 44  # 19 degrees of freedom, one in a thousand


def test_settings_that_mean_nothing_are_refused() -> None:
    for settings in [{"temperature": -1.0}, {"temperature": 1.0, "top_k": -3}, {"repetition_penalty": -1.0}]:
        with pytest.raises(RefusedError):
            Sampler(Sampling(**settings))
    sampler = Sampler(Sampling(repetition_penalty=1.2))
    for history in (torch.zeros(2, 3), torch.zeros(3)):
        with pytest.raises(RefusedError):
            sampler.seen(history)
    sampler = Sampler(Sampling(repetition_penalty=1.2))
    with pytest.raises(RefusedError):
        sampler.seen([[-1]])
    sampler.seen([[500]])  # some models embed more tokens than they can say
    assert sampler.pick(torch.zeros(1, 500), 1) == [0]
