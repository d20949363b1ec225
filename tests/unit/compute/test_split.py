"""What is found out about a model by watching it run on ghosts."""

from __future__ import annotations

import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import ModelOutput

from tests.unit.compute.checkpoints import TINY, tiny, tiny_config
from tests.unit.compute.kinds import KINDS
from torrentlm.compute.border import BorderShape, Carried, Returned, TokenIds
from torrentlm.compute.sizes import Size
from torrentlm.compute.skeleton import build_skeleton, read_config
from torrentlm.compute.split import Hints, Split
from torrentlm.compute.splitter import analyse, analyse_sides
from torrentlm.errors import ArtifactError, UnsupportedModelError

PACKAGE = Path(__file__).parents[3] / "torrentlm"
BATCH, TOKENS, LENGTH, SOURCE = (Size(rule, 1) for rule in ("batch", "tokens", "length", "source"))
HIDDEN = (BATCH, TOKENS, Size(offset=32))


def config(model_type: str = "llama", **settings: Any) -> Any:
    return AutoConfig.for_model(model_type, **TINY | settings)


def kind(name: str, **hints: Any) -> Split:
    return analyse(KINDS[name].build().config, Hints(**hints))


def shapes(border: BorderShape) -> list[tuple[Size, ...]]:
    return [tensor.sizes for tensor in border.tensors]


def returned(border: BorderShape) -> list[tuple[int, int]]:
    return [(slot.call, slot.index) for slot in border.slots if isinstance(slot, Returned)]


def test_parts_and_what_they_read() -> None:
    split = analyse(config())
    assert (split.module, split.layer_stack, split.layers) == ("", "model.layers", 6)
    assert [call.path for call in split.calls] == [f"model.layers.{layer}" for layer in range(6)]
    assert split.stem == ("model.embed_tokens.weight",)
    assert split.head == ("model.norm.weight", "lm_head.weight")
    assert split.extra == ((),) * 6
    assert split.tied == ()
    assert (split.inputs.cache, split.inputs.causal, split.chunks, split.width) == ("past_key_values", True, True, None)
    assert [(state.entries, state.per_token, state.per_row) for state in split.state] == [
        ((layer,), 2 * 2 * 8, 0) for layer in range(6)
    ]
    assert len(split.borders) == 7
    assert [shapes(border) for border in split.borders] == [[HIDDEN]] * 7
    assert [returned(border) for border in split.borders] == [[], *[[(call, 0)] for call in range(6)]]
    assert not any(isinstance(slot, TokenIds) for border in split.borders for slot in border.slots)


def test_tied_tensors_have_one_name() -> None:
    split = analyse(config(tie_word_embeddings=True))
    assert split.tied == (("lm_head.weight", "model.embed_tokens.weight"),)
    assert split.head == ("model.embed_tokens.weight", "model.norm.weight")


def test_positions_that_the_stem_looks_up_are_its_own() -> None:
    split = analyse(config("gpt2", n_embd=32, n_layer=6, n_head=4))
    assert split.stem == ("transformer.wte.weight", "transformer.wpe.weight")


def test_one_module_that_is_called_again_and_again() -> None:
    split = kind("one module", encoder=True)
    assert [call.path for call in split.calls] == ["albert.encoder.albert_layer_groups.0"] * 6
    assert split.extra == ((),) * 6 and split.layer_prefix(5) == "albert.encoder.albert_layer_groups.0."
    assert [shapes(border) for border in split.borders] == [[HIDDEN]] * 7


def test_layers_that_lie_in_several_lists() -> None:
    split = kind("parallel lists", encoder=True)
    parts = ("attentions", "layer_norm1", "ffns", "layer_norm2")
    assert sorted(split.layer_stack.split("+")) == sorted(f"transformer.{part}" for part in parts)
    assert [call.path for call in split.calls] == [f"transformer.{part}.{i}" for i in range(6) for part in parts]
    # The first residual goes around the first attention: what the stem makes is made again there.
    assert [bool(extra) for extra in split.extra] == [False, True, *[False] * 22]
    assert set(split.extra[1]) == set(split.stem)
    # Between two norms there are the residual and what is to be added to it; the first residual is the stem's.
    assert [len(returned(border)) for border in split.borders] == [0, 1, *[1, 2] * 11, 1]


def test_modules_that_layers_share_and_a_value_that_the_stem_hands_to_all() -> None:
    split = kind("shared modules")
    assert split.extra[:5] == ((),) * 5
    assert split.extra[5] and all(name.startswith("model.layers.2.shared_transf.") for name in split.extra[5])
    embedded = Carried(0, (0, 1))
    assert [embedded in border.slots for border in split.borders] == [True] * 6 + [False]
    assert next(value for value in split.carried if value.slot == embedded).places == tuple(
        (call, (0, 1)) for call in range(6)
    )
    assert split.stem == ("model.embed_tokens.weight",)


def test_inputs_that_each_layer_has_for_itself_are_the_stems() -> None:
    split = kind("per layer")
    assert "model.embed_tokens_per_layer.weight" in split.stem
    assert split.extra == ((),) * 6
    for number, border in enumerate(split.borders[:6]):
        own = [slot.call for slot in border.slots if isinstance(slot, Carried) and slot.call]
        assert own == list(range(max(1, number), 6))
    assert not any(isinstance(slot, TokenIds) for border in split.borders for slot in border.slots)
    assert shapes(split.borders[6])[0] == (Size(offset=4), *HIDDEN)


@pytest.mark.parametrize("name", ["per layer", "shared states"])
def test_states_that_later_layers_read_travel_as_far_as_they_are_read(name: str) -> None:
    split = kind(name)
    # Layers 4 and 5 have no states of their own: they read those of the last layer of their kind before them.
    assert [bool(state.entries) for state in split.state] == [True] * 4 + [False] * 2
    states = [(2, 1), (2, 2)], [(3, 1), (3, 2)]
    for number, due in ((3, states[0]), (4, states[0] + states[1]), (5, states[1]), (6, [])):
        assert [slot for slot in returned(split.borders[number]) if slot[1]] == due
    last = split.borders[5]
    assert shapes(last)[last.slots.index(Returned(3, 1))][2] == LENGTH
    assert [entry.key for entry in split.calls[3].maps] and not split.calls[4].maps


def test_positions_that_only_the_head_would_see_are_left_out() -> None:
    """Layers without states of their own may be given the last position only, where no more is asked for."""
    split = kind("shared states")
    first = split.borders[0]
    inputs = [sizes[1] for slot, sizes in zip(first.slots, shapes(first), strict=True) if slot != Carried(0, (0, 0))]
    assert inputs == [TOKENS] * 4 + [Size("wanted", 1)] * 2
    assert all(shapes(split.borders[call])[0][1] == TOKENS for call in range(1, 3))
    assert shapes(split.borders[6])[0] == (BATCH, Size("wanted", 1), Size(offset=32))


def test_states_of_fixed_size_are_found_and_cannot_be_cut() -> None:
    split = kind("state space")
    assert [(state.per_token, state.trims) for state in split.state] == [(0, False)] * 6
    assert split.state[0].per_row == 64 * 16 + 64 * 4 - 0 or split.state[0].per_row > 0
    assert split.rewind(range(6)) == "snapshot" and not split.chunks


def test_states_that_grow_and_windows() -> None:
    split = kind("windows")
    assert [state.window for state in split.state] == [8, None] * 3
    assert [split.rewind([layer]) for layer in range(6)] == ["snapshot", "trim"] * 3
    assert split.rewind([]) == "trim" and split.chunks
    mixed = kind("shared modules").state
    assert [state.per_token > 0 for state in mixed] == [False, False, True] * 2
    assert all(state.per_row > 0 and not state.trims for state in mixed)


def test_an_encoder_keeps_nothing() -> None:
    split = kind("encoder", encoder=True)
    assert (split.inputs.causal, split.inputs.output, split.replays) == (False, "logits", True)
    assert split.rewind(range(6)) == "replay" and not any(state.entries for state in split.state)
    base = config("bert")
    base.architectures = ["BertModel"]
    assert analyse(base).inputs.output == "last_hidden_state"
    assert analyse(base).head == ()


def test_both_sides_of_an_encoder_decoder() -> None:
    encoder, decoder = analyse_sides(KINDS["two sides"].build().config)
    assert (encoder.module, encoder.layer_stack, encoder.layers) == ("encoder", "encoder.block", 6)
    assert (decoder.module, decoder.layer_stack, decoder.layers) == ("", "decoder.block", 3)
    assert encoder.stem == decoder.stem == ("shared.weight",)
    assert (encoder.inputs.output, decoder.inputs.output, decoder.inputs.ids) == (
        "last_hidden_state",
        "logits",
        "decoder_input_ids",
    )
    assert (encoder.width, decoder.width) == (None, 32)
    # The first layer makes the position bias for all: of the text alone, and in the decoder of what it reads, too.
    assert shapes(encoder.borders[1]) == [HIDDEN, (Size(offset=1), Size(offset=4), TOKENS, TOKENS)]
    assert shapes(decoder.borders[1])[1:] == [
        (Size(offset=1), Size(offset=4), TOKENS, LENGTH),
        (Size(offset=1), Size(offset=4), TOKENS, SOURCE),
    ]
    assert [(state.per_token, state.per_source) for state in decoder.state] == [(64, 64)] * 3
    with pytest.raises(UnsupportedModelError, match="two sides"):
        analyse(KINDS["two sides"].build().config)


def test_every_holder_finds_the_same() -> None:
    for name in KINDS:
        model = KINDS[name].build().config
        one, other = (analyse_sides(model) for _ in range(2))
        for first, second in zip(one, other, strict=True):
            assert (first.borders, first.calls, first.carried) == (second.borders, second.calls, second.carried)
            assert (first.extra, first.state, first.chunks) == (second.extra, second.state, second.chunks)


def test_hints() -> None:
    split = analyse(config(), Hints(layer_stacks=("model.layers",), replay=True))
    assert split.replays and split.rewind(range(6)) == "replay"
    with pytest.raises(UnsupportedModelError, match=r"no list of layers model\.h; there are model\.layers"):
        analyse(config(), Hints(layer_stacks=("model.h",)))
    chosen = analyse(KINDS["parallel lists"].build().config, Hints(("transformer.ffns",), encoder=True))
    assert [call.path for call in chosen.calls] == [f"transformer.ffns.{layer}" for layer in range(6)]
    assert any("attentions" in name for name in chosen.extra[1])


def test_a_large_model_takes_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    huge = config(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=8,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
    )
    model = build_skeleton(huge, torch.float32)
    assert sum(parameter.nbytes for parameter in model.parameters()) > 6e9
    assert analyse(huge).layers == 8
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 1e9


def test_a_skeleton_reads_as_zeros_and_has_real_tables() -> None:
    model = build_skeleton(config(tie_word_embeddings=True), torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.any() for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model.model.rotary_emb.inv_freq, tiny().model.rotary_emb.inv_freq)


def test_a_folder_without_a_usable_config(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no config"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-thing"}')
    with pytest.raises(UnsupportedModelError, match=r"cannot make anything of"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises((ArtifactError, UnsupportedModelError)):
        read_config(tmp_path)


# What must be refused: models that do what no cut could do justice to, each in one line.

Box = list[torch.Tensor]
Behaviour = Callable[["OddLayer", torch.Tensor, Box], Any]


class OddConfig(PretrainedConfig):  # type: ignore[misc]
    model_type = "odd"
    own_classes: ClassVar[dict[str, Any]] = {}  # filled below


@dataclass
class OddOutput(ModelOutput):  # type: ignore[misc]
    logits: torch.Tensor | None = None


class OddLayer(nn.Module):
    behaviour: Behaviour

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.up = nn.Linear(8, 8)

    def forward(self, hidden: torch.Tensor, box: Box) -> Any:
        return type(self).behaviour(self, hidden, box)


class OddModel(PreTrainedModel):  # type: ignore[misc]
    config_class = OddConfig
    calls = staticmethod(lambda ids: range(3))
    listed = True

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(11, 8)
        layers = [OddLayer(number) for number in range(3)]
        self.layers = nn.ModuleList(layers) if self.listed else nn.Sequential(*layers)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor, return_dict: bool = True) -> OddOutput:
        hidden, box = self.embed(input_ids), []
        for number in type(self).calls(input_ids):
            hidden = self.layers[number](hidden, box)
        return OddOutput(logits=hidden if isinstance(hidden, torch.Tensor) else hidden[0])


OddConfig.own_classes = {"AutoModel": OddModel}


@contextmanager
def odd(monkeypatch: pytest.MonkeyPatch, behaviour: Behaviour, **changes: Any) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(OddLayer, "behaviour", behaviour, raising=False)
        for name, value in changes.items():
            patch.setattr(OddModel, name, value)
        yield


def plain(layer: OddLayer, hidden: torch.Tensor, box: Box) -> torch.Tensor:
    return hidden + layer.up(hidden)


def hides(layer: OddLayer, hidden: torch.Tensor, box: Box) -> torch.Tensor:
    """What one layer leaves in a list, the next one takes out."""
    box.append(layer.up(hidden))
    return hidden + box[0]


def changes_in_place(layer: OddLayer, hidden: torch.Tensor, box: Box) -> torch.Tensor:
    if not box:
        box.append(hidden)
    box[0].add_(layer.up(hidden))
    return box[0]


def opaque(layer: OddLayer, hidden: torch.Tensor, box: Box) -> Any:
    return (hidden, object()) if layer.number < 2 else hidden


def varying(layer: OddLayer, hidden: torch.Tensor, box: Box) -> Any:
    return (hidden,) * (1 + hidden.shape[1] % 3) if layer.number == 2 else hidden


def fails(layer: OddLayer, hidden: torch.Tensor, box: Box) -> Any:
    raise KeyError("no such thing")


def test_a_model_of_ones_own_is_cut_like_any(monkeypatch: pytest.MonkeyPatch) -> None:
    with odd(monkeypatch, plain):
        split = analyse(OddConfig())
    assert (split.layer_stack, split.layers, split.stem) == ("layers", 3, ("embed.weight",))
    assert split.extra == ((),) * 3 and split.replays


@pytest.mark.parametrize(
    ("behaviour", "changes", "reason"),
    [
        (hides, {}, "reads what layer call 0 made and did not return"),
        (opaque, {}, "return a object, which cannot be sent"),
        (varying, {}, "changes with the text"),
        (fails, {}, "forward fails without weights"),
        (plain, {"calls": staticmethod(lambda ids: range(1 + ids.shape[1] % 3))}, "changes with the text"),
        (plain, {"calls": staticmethod(lambda ids: ())}, "none of its layers one by one"),
        (plain, {"listed": False}, "no list of layers"),
    ],
)
def test_what_cannot_be_split_exactly_is_refused(
    monkeypatch: pytest.MonkeyPatch, behaviour: Behaviour, changes: dict[str, Any], reason: str
) -> None:
    with odd(monkeypatch, behaviour, **changes), pytest.raises(UnsupportedModelError, match=reason):
        analyse(OddConfig())


def test_a_tensor_that_layers_change_in_place_is_refused_or_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call would change the stem's own tensor, which no other holder has."""
    with odd(monkeypatch, changes_in_place), pytest.raises(UnsupportedModelError, match="made and did not return"):
        analyse(OddConfig())


def test_a_model_that_reads_no_text_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="forward"):
        analyse(tiny_config("vit", num_hidden_layers=2))


ORDINARY = {"beam", "bit", "ctrl"}
"""Words of plain English, here in Ctrl-C and a bit of a set, that some family of models is called, too."""
LONGER = {"BitTorrent", "EncoderDecoderCache"}
"""Names that are not made of an architecture's, although they begin like one's."""


def names_of_architectures() -> tuple[set[str], set[str]]:
    """Every model type that transformers knows, and what the names of its classes begin with."""
    types = {spelled for name in CONFIG_MAPPING for spelled in (name, name.replace("-", "_"))}
    mappings = (vars(modeling_auto)[name] for name in dir(modeling_auto) if name.endswith("_MAPPING_NAMES"))
    listed = (names for mapping in mappings for names in mapping.values())
    classes = {name for names in listed for name in ([names] if isinstance(names, str) else names)}
    kinds = r"For[A-Z]|Model|LMHead|WithLM|Text[A-Z]|Encoder|Decoder|PreTrained|Vision|Audio"
    return types, {found[1] for name in classes if (found := re.match(rf"(.+?)(?:{kinds}).*", name))}


def test_no_file_knows_an_architecture_by_name() -> None:
    types, prefixes = names_of_architectures()
    assert {"llama", "gpt2", "t5", "mixtral"} <= types and {"Llama", "GPT2", "T5", "Mixtral"} <= prefixes
    found = []
    for source in sorted(PACKAGE.rglob("*.py")):
        text = source.read_text().replace("llama.cpp", "")  # the program
        for name in sorted(set(re.findall(r"[A-Za-z0-9_]+", text)) - LONGER):
            ends = [*(capital.start() for capital in re.finditer("[A-Z_]", name)), len(name)]
            if name.lower() in types - ORDINARY or any(name[:end] in prefixes for end in ends):
                found.append(f"{source.relative_to(PACKAGE)}: {name}")
    assert found == []
