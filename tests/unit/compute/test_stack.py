from __future__ import annotations

import pytest
from torch import nn

from torrentlm.compute.stack import MAX_STACKS, find_stacks
from torrentlm.errors import UnsupportedModelError


def layers(count: int, width: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(width, width) for _ in range(count))


class Tree(nn.Module):
    """A module of named children."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def paths(model: nn.Module, root: str = "") -> list[str]:
    return [stack.path for stack in find_stacks(model, root)]


def test_the_list_with_the_most_parameters_comes_first_and_all_together_last() -> None:
    model = Tree(small=layers(9, 2), body=Tree(large=layers(2, 30)), head=nn.Linear(90, 90))
    assert paths(model) == ["body.large", "small", "body.large+small"]
    every = find_stacks(model)[-1]
    assert every.paths == ("body.large", "small")
    assert [path for path, _ in every.layers][:3] == ["body.large.0", "body.large.1", "small.0"]
    assert len(every.layers) == 11


def test_of_equal_lists_the_first_in_the_tree_comes_first() -> None:
    assert paths(Tree(b=layers(2, 4), a=layers(2, 4))) == ["b", "a", "b+a"]


def test_entries_of_nested_lists_are_the_layers() -> None:
    model = Tree(blocks=nn.ModuleList([layers(2, 4), nn.ModuleList([layers(1, 4)]), nn.Linear(4, 4)]))
    [stack] = find_stacks(model)
    assert [path for path, _ in stack.layers] == ["blocks.0.0", "blocks.0.1", "blocks.1.0.0", "blocks.2"]
    assert all(model.get_submodule(path) is module for path, module in stack.layers)


def test_lists_within_layers_are_no_stacks_of_their_own() -> None:
    experts = Tree(experts=layers(50, 8))
    assert paths(Tree(layers=nn.ModuleList([experts, nn.Linear(2, 2)]))) == ["layers"]


def test_only_what_is_below_the_root() -> None:
    model = Tree(encoder=Tree(block=layers(3, 4)), decoder=Tree(block=layers(3, 8)))
    assert paths(model, "encoder") == ["encoder.block"]
    assert paths(model) == ["decoder.block", "encoder.block", "decoder.block+encoder.block"]


def test_no_more_stacks_than_are_worth_trying() -> None:
    model = Tree(**{f"part{number}": layers(1, 2 + number) for number in range(20)})
    found = find_stacks(model)
    assert len(found) == MAX_STACKS + 1 and len(found[-1].paths) == MAX_STACKS


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), Tree(empty=nn.ModuleList()), Tree(nested=nn.ModuleList([nn.ModuleList()]))]
)
def test_a_model_without_layers_is_refused(model: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match="nowhere to cut"):
        find_stacks(model)
