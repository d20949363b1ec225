from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torrentlm.compute.split import Split
from torrentlm.errors import ArtifactError, UnsupportedModelError
from torrentlm.manifest.manifest import BlockFile
from torrentlm.publish.plan import Plan, plan


@dataclass(frozen=True)
class Cut:
    """As much of a Split as planning looks at."""

    layer_stack: str
    layers: int
    stem: tuple[str, ...]
    head: tuple[str, ...]
    extra: tuple[tuple[str, ...], ...]
    tied: tuple[tuple[str, str], ...] = ()
    canonical: dict[str, str] = field(default_factory=dict)
    calls: tuple[str, ...] = ()
    """The modules that are called, where that is not each layer of the stack once."""

    def layer_prefix(self, layer: int) -> str:
        return f"{self.calls[layer] if self.calls else f'{self.layer_stack}.{layer}'}."


def planned(
    names: set[str], cut: Cut, per_block: int = 1, stored: set[str] | None = None
) -> tuple[Plan, list[set[str]]]:
    """The plan, and per block the checkpoint's names as a reader of the manifest would find them."""
    return planned_sides(names, [cut], per_block, stored)


def planned_sides(
    names: set[str], cuts: list[Cut], per_block: int = 1, stored: set[str] | None = None
) -> tuple[Plan, list[set[str]]]:
    sides = [cast(Split, cut) for cut in cuts]
    result = plan(names if stored is None else stored, names, sides, per_block)
    blocks = []
    for block in result.blocks:
        found = set()
        for index in block.files:
            file = result.files[index]
            for in_file, in_checkpoint in file.tensors.items():
                assert BlockFile(index, file.names).full_name(in_file) == in_checkpoint
                found.add(in_checkpoint)
        blocks.append(found)
    return result, blocks


@given(
    st.sampled_from(["layers", "model.layers", "a.b.h"]),
    st.integers(1, 12),
    st.integers(1, 5),
    st.data(),
)
def test_every_block_finds_what_it_reads(stack: str, layers: int, per_block: int, data: st.DataObject) -> None:
    parent = stack.rpartition(".")[0]
    others = ["embed.weight", "norm.weight", "lm_head.weight", "table", f"{parent}.norm.weight", f"{parent}.table"]
    subset = st.lists(st.sampled_from(others), unique=True).map(tuple)
    cut = Cut(stack, layers, data.draw(subset), data.draw(subset), tuple(data.draw(subset) for _ in range(layers)))
    own = [f"{stack}.{layer}.w{k}" for layer in range(layers) for k in range(2)]
    result, blocks = planned({*others, *own}, cut, per_block)
    assert blocks[0] == set(cut.stem)
    assert blocks[-1] == set(cut.head)
    covered = []
    for block, found in zip(result.blocks[1:-1], blocks[1:-1], strict=True):
        assert block.layers is not None
        covered += list(block.layers)
        expected = {f"{stack}.{layer}.w{k}" for layer in block.layers for k in range(2)}
        assert found == expected.union(*(cut.extra[layer] for layer in block.layers))
    assert covered == list(range(layers))
    everything = set().union(*blocks)
    assert set(result.left_out) == {*others, *own} - everything
    stored = [name for file in result.files for name in file.tensors.values()]
    assert sorted(stored) == sorted(everything)


def test_layers_with_many_digits_are_not_confused() -> None:
    names = {f"layers.{layer}.w" for layer in range(12)}
    _, blocks = planned(names, Cut("layers", 12, (), (), ((),) * 12))
    assert blocks[1:-1] == [{f"layers.{layer}.w"} for layer in range(12)]


def test_names_that_clash_without_their_prefix_keep_it() -> None:
    names = {"norm.weight", "model.norm.weight", "model.layers.0.w"}
    result, _ = planned(names, Cut("model.layers", 1, (), ("norm.weight", "model.norm.weight"), ((),)))
    assert result.files[-1].names == (("", ""),)


def test_untied_head_keeps_its_full_name() -> None:
    names = {"model.norm.weight", "lm_head.weight", "model.layers.0.w"}
    result, _ = planned(names, Cut("model.layers", 1, (), ("lm_head.weight", "model.norm.weight"), ((),)))
    assert set(result.files[-1].tensors) == {"norm.weight", "lm_head.weight"}


def test_a_weight_stored_under_its_alias_is_published_under_its_own_name() -> None:
    cut = Cut("layers", 1, ("embed",), ("embed",), ((),), (("head", "embed"),), {"head": "embed"})
    names = {"embed", "head", "layers.0.w"}
    sides = [cast(Split, cut)]
    assert plan({"head", "layers.0.w"}, names, sides, 1).files[0].tensors == {"embed": "head"}
    assert plan(names, names, sides, 1).files[0].tensors == {"embed": "embed"}
    assert plan(names, names, sides, 1).left_out == ("head",)


def test_a_module_that_is_called_again_is_one_file_of_all_its_blocks() -> None:
    names = {"h.0.w", "h.1.w", "embed"}
    cut = Cut("h", 4, ("embed",), (), ((),) * 4, calls=("h.0", "h.1", "h.0", "h.1"))
    result, blocks = planned(names, cut)
    assert blocks[1:-1] == [{"h.0.w"}, {"h.1.w"}, {"h.0.w"}, {"h.1.w"}]
    assert result.blocks[1].files == result.blocks[3].files and result.blocks[2].files == result.blocks[4].files
    assert len(result.files) == 3
    _, pairs = planned(names, cut, per_block=2)
    assert pairs[1:-1] == [{"h.0.w", "h.1.w"}] * 2


def test_layers_of_several_lists() -> None:
    names = {f"model.{part}.{layer}.w" for part in ("attentions", "ffns") for layer in range(2)} | {"model.embed"}
    calls = ("model.attentions.0", "model.ffns.0", "model.attentions.1", "model.ffns.1")
    cut = Cut("model.attentions+model.ffns", 4, ("model.embed",), (), ((),) * 4, calls=calls)
    result, blocks = planned(names, cut, per_block=2)
    assert blocks[1] == {"model.attentions.0.w", "model.ffns.0.w"}
    assert blocks[2] == {"model.attentions.1.w", "model.ffns.1.w"}
    assert result.files[0].names == (("", "model."),)  # beside the lists, as what is beside a single list
    assert set(result.files[1].tensors) == {"0.w", "1.w"}


def test_weights_that_a_layer_lends_to_others_and_aliases_below_a_layer() -> None:
    """The second layer's own matrix is the first one's; the last layer reads a matrix of the first, too."""
    names = {"h.0.w", "h.1.w", "h.2.w"}
    tied = (("h.1.w", "h.0.w"),)
    cut = Cut("h", 3, (), (), ((), (), ("h.0.w",)), tied, dict(tied))
    result, blocks = planned(names, cut, stored={"h.0.w", "h.2.w"})
    assert blocks[1:-1] == [{"h.0.w"}, {"h.0.w"}, {"h.0.w", "h.2.w"}]
    assert len(result.files) == 2


def test_two_sides_share_files_and_have_blocks_of_their_own() -> None:
    names = {"shared", "encoder.block.0.w", "encoder.block.1.w", "encoder.norm", "decoder.block.0.w", "decoder.norm"}
    encoder = Cut("encoder.block", 2, ("shared",), ("encoder.norm",), ((), ()))
    decoder = Cut("decoder.block", 1, ("shared",), ("shared", "decoder.norm"), ((),))
    result, blocks = planned_sides(names, [encoder, decoder], per_block=2)
    assert [block.kind for block in result.blocks] == ["stem", "layers", "head", "stem", "layers", "head"]
    assert [str(block) for block in result.blocks[1::3]] == ["layers 0-1", "layers 0"]
    assert blocks == [
        {"shared"},
        {"encoder.block.0.w", "encoder.block.1.w"},
        {"encoder.norm"},
        {"shared"},
        {"decoder.block.0.w"},
        {"shared", "decoder.norm"},
    ]
    assert result.blocks[0].files == result.blocks[3].files
    assert result.left_out == ()


def test_missing_and_renamed() -> None:
    cut = Cut("layers", 1, ("embed",), (), ((),))
    names = {"embed", "layers.0.w"}
    with pytest.raises(ArtifactError, match=r"lacks tensor layers\.0\.w"):
        planned(names, cut, stored={"embed"})
    with pytest.raises(UnsupportedModelError, match=r"another way.*h\.0\.w"):
        planned(names, cut, stored={"embed", "h.0.w"})
