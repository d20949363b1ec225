"""Sessions with adapters over three holder processes, against the model with each adapter merged into it by peft."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import torrentlm
from tests.e2e import checkpoint
from tests.e2e.processes import Seed, run
from tests.peft_adapters import make_adapter, merged

PROMPTS = ("Once upon a time", "def f(x):")
NEW = 16
PLAIN = 20  # generations until the better route is found
PARTS = ("0-1", "2-3", "4-5")


@dataclass(frozen=True)
class Adapted:
    """The swarm, and what it serves: the base, and adapters by name with their folders and magnets."""

    base: Path
    magnet: str
    folders: dict[str, Path]
    adapters: dict[str, str]
    data: Path

    def connect(self) -> torrentlm.Model:
        return torrentlm.connect(self.magnet, data=self.data, port=0, dht_bootstrap=["none"])

    def expected(self, prompt: str, adapter: str | None) -> list[int]:
        if adapter is None:
            return checkpoint.greedy(self.base, prompt, NEW)
        ids = torch.tensor([self.ids(prompt)])
        whole = merged(self.base, self.folders[adapter]).generate(ids, max_new_tokens=NEW, do_sample=False)
        return [int(token) for token in whole[0, ids.shape[1] :]]

    def ids(self, prompt: str) -> list[int]:
        from transformers import PreTrainedTokenizerFast

        return list(PreTrainedTokenizerFast.from_pretrained(self.base)(prompt)["input_ids"])


def table(name: str) -> str:
    return f'[[adapter]]\nname = "{name}"\nfolder = "{name}"\n'


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Adapted]:
    """The publisher of the model holds the first part; one of two that joined publishes an adapter. All apply them."""
    folder = tmp_path_factory.mktemp("adapted")
    base = checkpoint.make(folder / "base")
    folders = {
        "pirate": make_adapter(base, folder / "pirate", 1),
        "poet": make_adapter(base, folder / "poet", 2, r=3, use_rslora=True, target_modules=["o_proj", "up_proj"]),
        "late": make_adapter(base, folder / "late", 3, target_modules=["v_proj"], layers_to_transform=[2, 3]),
    }
    recipe = folder / "model.toml"
    recipe.write_text(
        '[model]\nname = "base"\n[model.source]\nfolder = "base"\n'
        + "".join(table(name) for name in ("pirate", "poet"))
    )
    applies = ("--adapters", "1MB")
    with Seed(str(recipe), folder / "a", "--blocks", PARTS[0], *applies) as first:
        events = [first.wait_for("adapter"), first.wait_for("adapter")]
        magnet = first.wait_for("ready")["magnet"]
        joining = folder / "joining.toml"
        joining.write_text(f'magnet = "{magnet}"\n' + table("late"))
        with (
            Seed(magnet, folder / "b", "--blocks", PARTS[1], *applies) as second,
            Seed(str(joining), folder / "c", "--blocks", PARTS[2], *applies) as third,
        ):
            second.wait_for("ready")
            events.append(third.wait_for("adapter"))
            third.wait_for("ready")
            assert [event["blocks"] for event in events] == [[1, 2, 3, 4], [1, 2, 3, 4], [3, 4]]
            adapters = {event["name"]: event["magnet"] for event in events}
            yield Adapted(base, magnet, folders, adapters, folder / "client")


@pytest.fixture(scope="module")
def model(swarm: Adapted) -> Iterator[torrentlm.Model]:
    with swarm.connect() as model:
        yield model


def tokens(model: torrentlm.Model, prompt: str, adapter: str | None) -> list[int]:
    model.generate(prompt, max_new_tokens=NEW, adapter=adapter)
    assert model.last is not None
    return list(model.last.tokens)


def hops_of(model: torrentlm.Model) -> int:
    assert model.last is not None
    return len(model.last.route)


@pytest.mark.parametrize("name", ["pirate", "poet", "late", None])
def test_greedy_tokens_are_the_merged_models(model: torrentlm.Model, swarm: Adapted, name: str | None) -> None:
    adapter = None if name is None else swarm.adapters[name]
    for prompt in PROMPTS:
        assert tokens(model, prompt, adapter) == swarm.expected(prompt, name)
    assert model.last is not None
    assert [f"{hop.first}-{hop.last}" for hop in model.last.route] == list(PARTS)


@pytest.mark.parametrize("name", ["pirate", "poet", "late"])
def test_logits_are_the_merged_models(model: torrentlm.Model, swarm: Adapted, name: str) -> None:
    ids = swarm.ids(PROMPTS[0])
    with model.session(max_length=64, adapter=swarm.adapters[name]) as session, torch.no_grad():
        found = session.step([ids])
        whole = merged(swarm.base, swarm.folders[name])(torch.tensor([ids])).logits
        plain = merged(swarm.base, swarm.folders["pirate" if name != "pirate" else "poet"])(torch.tensor([ids])).logits
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, plain, atol=0.1)


def test_sessions_with_different_adapters_take_turns_step_by_step(model: torrentlm.Model, swarm: Adapted) -> None:
    names = ("pirate", None, "poet")
    expected = [swarm.expected(PROMPTS[0], name) for name in names]
    assert len({tuple(each) for each in expected}) == 3
    with contextlib.ExitStack() as stack:
        sessions = [
            stack.enter_context(model.session(max_length=64, adapter=name and swarm.adapters[name])) for name in names
        ]
        given = [swarm.ids(PROMPTS[0])] * 3
        said: list[list[int]] = [[], [], []]
        for _ in range(NEW):
            for number, session in enumerate(sessions):
                said[number].append(int(session.step([given[number]], last_only=True)[0, -1].argmax()))
                given[number] = said[number][-1:]
    assert said == expected


def test_generations_with_different_adapters_run_at_the_same_time(model: torrentlm.Model, swarm: Adapted) -> None:
    adapters = (swarm.adapters["pirate"], None, swarm.adapters["poet"])

    def generate(adapter: str | None) -> str:
        return model.generate(PROMPTS[0], max_new_tokens=48, adapter=adapter)

    alone = [generate(adapter) for adapter in adapters]
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(generate, adapters)) == alone


def test_the_command_takes_an_adapter(swarm: Adapted) -> None:
    options = ("--data", str(swarm.data), "--port", "0", "--dht-bootstrap", "none", "--host", "127.0.0.1", "--json")
    asked = ("--prompt", PROMPTS[0], "--max-new-tokens", str(NEW), "--adapter", swarm.adapters["poet"])
    done = run("generate", swarm.magnet, *asked, *options)
    assert json.loads(done.stdout)["tokens"] == swarm.expected(PROMPTS[0], "poet"), done.stderr
    wrong = run("generate", swarm.adapters["poet"], *asked, *options)
    assert (wrong.returncode, wrong.stdout) == (1, "") and "give this one to --adapter" in wrong.stderr


def test_a_chat_has_its_adapter_in_every_turn(model: torrentlm.Model, swarm: Adapted) -> None:
    with model.chat(adapter=swarm.adapters["pirate"]) as chat, model.chat() as plain:
        for message in ("Hello", "And then?"):
            said = ["".join(each.send(message, max_new_tokens=8)) for each in (chat, plain)]
            assert said[0] != said[1]


def test_the_route_goes_around_holders_that_apply_none(swarm: Adapted, tmp_path: Path) -> None:
    """A holder of the whole model, which is the better route, has not opted in."""
    with Seed(swarm.magnet, tmp_path / "all", "--blocks", "0-5") as alone:
        magnet = alone.wait_for("ready")["magnet"]
        with torrentlm.connect(magnet, data=tmp_path / "client", port=0, dht_bootstrap=["none"]) as model:
            for _ in range(PLAIN):  # which route is better is measured, and one measurement may be off
                assert tokens(model, PROMPTS[0], None) == swarm.expected(PROMPTS[0], None)
                if hops_of(model) == 1:
                    break
            assert hops_of(model) == 1
            assert tokens(model, PROMPTS[0], swarm.adapters["pirate"]) == swarm.expected(PROMPTS[0], "pirate")
            assert hops_of(model) == 3
            # Only the last two layers are changed: blocks 0 to 2 may be anybody's.
            assert tokens(model, PROMPTS[0], swarm.adapters["late"]) == swarm.expected(PROMPTS[0], "late")
            assert model.last is not None
            assert (model.last.route[0].first, model.last.route[-1].last) == (0, 5)


def test_what_is_no_adapter_of_this_model_is_refused(model: torrentlm.Model, swarm: Adapted) -> None:
    with pytest.raises(torrentlm.ArtifactError, match="not one of a torrentlm adapter"):
        model.generate(PROMPTS[0], max_new_tokens=4, adapter=swarm.magnet)
    with pytest.raises(torrentlm.ArtifactError, match="not a magnet link"):
        model.generate(PROMPTS[0], max_new_tokens=4, adapter="pirate")
    assert tokens(model, PROMPTS[0], None) == swarm.expected(PROMPTS[0], None)
