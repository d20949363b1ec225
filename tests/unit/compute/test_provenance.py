"""Where values come from, one operation at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from torrentlm.compute.provenance import Provenance, Sources

A, B, C = 1, 2, 4


@pytest.fixture
def watch() -> Provenance:
    return Provenance()


@pytest.fixture
def one(watch: Provenance) -> torch.Tensor:
    return marked(watch, A)


@pytest.fixture
def other(watch: Provenance) -> torch.Tensor:
    return marked(watch, B)


def marked(watch: Provenance, sources: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    tensor = torch.ones(4, 4, dtype=dtype)
    watch.mark(tensor, sources)
    return tensor


@pytest.mark.parametrize(
    "operation",
    [
        torch.add,
        torch.matmul,
        torch.maximum,
        torch.eq,
        lambda a, b: torch.where(a > 0, a, b),
        lambda a, b: torch.cat([a, b]),
        lambda a, b: functional.embedding(b.long(), a),
        lambda a, b: a[b.long()],
        lambda a, b: torch.scatter(a, 0, b.long(), 1.0),
        lambda a, b: functional.layer_norm(a, (4,), b[0]),
        lambda a, b: functional.scaled_dot_product_attention(a[None], b[None], b[None]),
        lambda a, b: torch.einsum("ij,jk->ik", a, b),
        lambda a, b: torch.topk(a + b, 2).indices,
    ],
)
def test_results_have_the_sources_of_all_arguments(
    watch: Provenance, one: torch.Tensor, other: torch.Tensor, operation: Callable[..., torch.Tensor]
) -> None:
    with watch:
        made = operation(one, other)
    assert watch.of(made) == A | B
    assert (watch.of(one), watch.of(other)) == (A, B)
    assert watch.read == A | B


def test_integers_and_values_without_gradients_are_followed(watch: Provenance) -> None:
    ids = marked(watch, A, torch.int64)
    with torch.no_grad(), watch:
        positions = torch.cumsum((ids != 0).int(), dim=1) - 1
        mask = torch.triu(torch.ones(4, 4, dtype=torch.bool)) & (ids > 0)
        plain = torch.arange(4) + 1
    assert (watch.of(positions), watch.of(mask), watch.of(plain)) == (A, A, 0)


def test_what_is_written_in_place_has_both_sources_and_so_have_all_its_views(
    watch: Provenance, one: torch.Tensor, other: torch.Tensor
) -> None:
    with watch:
        view = one[1:, :2].t()
        assert watch.of(view) == A
        one.add_(other)
        assert watch.of(view) == watch.of(one) == A | B
        target = torch.zeros(4, 4)
        assert watch.of(target) == 0
        target[2:] = other[2:]
        assert watch.of(target) == B
        target[0].copy_(one[0])
        assert watch.of(target[3]) == A | B  # a storage is followed as one


@pytest.mark.parametrize(
    "write",
    [
        lambda target, given: torch.add(given, 1, out=target),
        lambda target, given: target.index_copy_(0, torch.arange(4), given),
        lambda target, given: target.masked_fill_(given > 0, 0.0),
        lambda target, given: target.scatter_(0, torch.zeros(4, 4, dtype=torch.int64), given),
        lambda target, given: torch._foreach_add_([target], [given]),
        lambda target, given: target.index_put_((given.long()[0],), torch.zeros(4)),
    ],
)
def test_every_way_of_writing_is_seen(
    watch: Provenance, one: torch.Tensor, write: Callable[[torch.Tensor, torch.Tensor], object]
) -> None:
    target = torch.zeros(4, 4)
    with watch:
        write(target, one)
    assert watch.of(target) & A
    assert watch.of(one) == A


@pytest.mark.parametrize(
    "operation",
    [
        torch.zeros_like,
        torch.ones_like,
        torch.empty_like,
        torch.rand_like,
        lambda a: torch.full_like(a, 3),
        lambda a: a.new_zeros(7),
        lambda a: a.new_full((2,), 1.0),
        lambda a: torch.arange(a.shape[0]),
        lambda a: torch.zeros(16).view_as(a),
        lambda a: torch.zeros(1).expand_as(a),
    ],
)
def test_what_only_takes_a_shape_has_no_source(
    watch: Provenance, one: torch.Tensor, operation: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    with watch:
        made = operation(one)
    assert watch.of(made) == 0 and watch.read == 0


def test_within_marks_what_is_made_from_any_source_and_nothing_else(
    watch: Provenance, one: torch.Tensor, other: torch.Tensor
) -> None:
    with watch:
        with watch.within(C):
            inside, plain = one + 1, torch.ones(2) + 1
            other.mul_(2)
        outside = one + inside
        with watch.within(C), watch.within(B):
            nested = one + 1
        after = one + 1
    assert (watch.of(inside), watch.of(plain), watch.of(other)) == (A | C, 0, B | C)
    assert (watch.of(outside), watch.of(nested), watch.of(after)) == (A | C, A | B, A)


def test_within_ends_with_an_error_too(watch: Provenance, one: torch.Tensor) -> None:
    with watch, pytest.raises(RuntimeError), watch.within(C):
        torch.ones(2) + torch.ones(3)
    assert watch.inside == 0


def test_a_copy_can_be_marked_anew(watch: Provenance, one: torch.Tensor) -> None:
    with watch:
        copy = one.clone()
        watch.mark(copy, C)
        made = copy + 1
    assert (watch.of(one), watch.of(made)) == (A, C)


def test_everything_is_forgotten(watch: Provenance, one: torch.Tensor) -> None:
    watch.forget()
    with watch:
        assert watch.of(one + 1) == 0


def test_memory_that_is_used_again_is_another_tensor(watch: Provenance) -> None:
    with watch:
        for _ in range(200):
            tensor = torch.empty(64)
            assert watch.of(tensor) == 0
            watch.mark(tensor, A)
            del tensor


def test_sources_have_a_bit_each() -> None:
    sources = Sources()
    first, second = sources.bit("weight"), sources.bit(("call", 3))
    assert first != second and sources.bit("weight") == first
    assert list(sources.named(first | second)) == ["weight", ("call", 3)]
    assert list(sources.named(second)) == [("call", 3)] and list(sources.named(0)) == []
