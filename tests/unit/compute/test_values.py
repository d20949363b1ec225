from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

from torrentlm.compute.values import at, flatten, mutable_maps, rebuild, replace_at, tensors_at
from torrentlm.errors import UnsupportedModelError


class Pair(NamedTuple):
    one: Any
    other: Any


@dataclass
class TwoStates(ModelOutput):
    hidden: torch.Tensor | None = None
    scale: torch.Tensor | None = None


constants = st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3)
leaves = constants | st.just("tensor") | st.just("cache")
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.builds(Pair, inner, inner),
        st.dictionaries(st.text(max_size=3) | st.integers(0, 3), inner, max_size=3),
    ),
    max_leaves=6,
)
CACHE = DynamicCache()


def filled(value: Any, made: list[torch.Tensor]) -> Any:
    """With a new tensor where "tensor" stands and the session's cache for "cache"."""
    if value == "tensor":
        made.append(torch.full((2,), float(len(made))))
        return made[-1]
    if value == "cache":
        return CACHE
    if isinstance(value, Pair):
        return Pair(*(filled(item, made) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(filled(item, made) for item in value)
    if isinstance(value, dict):
        return {key: filled(item, made) for key, item in value.items()}
    return value


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor | DynamicCache):
        return one is other
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return type(other) is type(one) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and bool(one == other)


@given(values)
def test_any_return_value_is_put_together_again(value: Any) -> None:
    made: list[torch.Tensor] = []
    value = filled(value, made)
    tensors, form = flatten(value)
    assert len(tensors) == len(made) and all(map(same, tensors, made))
    assert same(value, rebuild(tensors, form, CACHE))
    others = [tensor + 1 for tensor in tensors]
    assert flatten(rebuild(others, form, CACHE))[1] == form
    assert all(map(same, flatten(rebuild(others, form, CACHE))[0], others))


def test_another_sessions_cache_is_put_where_the_probes_was() -> None:
    tensors, form = flatten((torch.zeros(1), DynamicCache()))
    assert rebuild(tensors, form, CACHE)[1] is CACHE


def test_outputs_of_models_keep_their_class_and_leave_out_what_is_none() -> None:
    hidden = torch.ones(1, 2, 3)
    stock = BaseModelOutputWithPast(last_hidden_state=hidden)
    for output in (stock, TwoStates(hidden=hidden), TwoStates(scale=hidden)):
        tensors, form = flatten(output)
        again = rebuild(tensors, form, None)
        assert type(again) is type(output) and list(again) == list(output)
        assert next(iter(again.values())) is hidden
    assert flatten(TwoStates(hidden=hidden))[1] != flatten(TwoStates(scale=hidden))[1]


def test_old_style_named_tuples() -> None:
    kind = namedtuple("kind", "states gates")
    tensors, form = flatten([kind(torch.zeros(1), None)])
    [again] = rebuild(tensors, form, None)
    assert type(again) is kind and again.states is tensors[0] and again.gates is None


def test_what_cannot_travel_is_refused() -> None:
    deep: Any = torch.zeros(1)
    for _ in range(20):
        deep = (deep,)
    for value in (object(), (torch.zeros(1), {"f": lambda: None}), deep, {torch.zeros(1)}):
        with pytest.raises(UnsupportedModelError):
            flatten(value)


def test_tensors_are_found_and_replaced_in_a_call() -> None:
    one, two = torch.zeros(1), torch.ones(1)
    call = ((one, 3), {"pair": (two, None), "cache": object(), "map": {7: two}})
    assert [place for place, _ in tensors_at(call)] == [(0, 0), (1, "pair", 0), (1, "map", 7)]
    assert at(call, (1, "pair", 0)) is two
    new = torch.full((1,), 2.0)
    changed = replace_at(call, {(1, "pair", 0): new, (0, 0): None})
    assert changed[1]["pair"][0] is new and changed[0] == (None, 3) and changed[1]["cache"] is call[1]["cache"]
    assert call[1]["pair"][0] is two and call[0][0] is one
    assert replace_at(call, {}) is call
    assert replace_at(one, {(): new}) is new


@given(values, st.data())
def test_replacing_changes_only_the_places_named(value: Any, data: st.DataObject) -> None:
    value = ((filled(value, []),), {})
    found = dict(tensors_at(value))
    chosen = data.draw(st.sets(st.sampled_from(sorted(found, key=str)))) if found else set()
    replacements = {place: torch.full((1,), -1.0) for place in chosen}
    changed = replace_at(value, replacements)
    after = dict(tensors_at(changed))
    assert list(after) == list(found)
    assert all(after[place] is replacements.get(place, tensor) for place, tensor in found.items())


def test_named_tuples_are_passed_over_where_tensors_are_replaced() -> None:
    """They could not be made anew from a row of items."""
    assert list(tensors_at(((Pair(torch.zeros(1), None),), {}))) == []


def test_maps_that_a_layer_could_write_to() -> None:
    shared: dict[str, Any] = {}
    args, kwargs = (torch.zeros(1), shared), {"more": {}, "output": TwoStates(hidden=torch.zeros(1)), "none": None}
    assert [place for place, _ in mutable_maps(args, kwargs)] == [(0, 1), (1, "more")]
    assert next(found for _, found in mutable_maps(args, kwargs)) is shared
