"""Whether a model gives for a prompt in parts, as long ones come, what it gives for the whole prompt. Some do not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PretrainedConfig

from torrentlm.compute.border import pack, unpack
from torrentlm.compute.chain import Part, step
from torrentlm.compute.inputs import Encoded
from torrentlm.compute.quantization.narrow import AS_PUBLISHED
from torrentlm.compute.split import Hints, Split
from torrentlm.compute.splitter import analyse_sides
from torrentlm.compute.weights import Quantization
from torrentlm.errors import RefusedError, RemoteProtocolError, UnsupportedModelError
from torrentlm.publish.thresholds import LONGEST, thresholds, with_small
from torrentlm.wire.messages import Want
from torrentlm.wire.tensors import Tensor

TOKENS = (18, 14, 8)
"""How many come at a time; fewer for a model that ends before."""
LEAST = 6
DIFFERS = (
    "this model cannot be published as it is: a prompt in parts gives something else than the whole prompt;"
    " with chunks = false in [model.split] holders get each prompt whole"
)
ROWS = 4
"""Prompts: some models pick a few of the earlier tokens, and not in every prompt others when it comes in parts."""
ALIKE = 1e-3
"""How far apart values may be in F32, as a share of one more than the largest: rounding is seen up to 1e-4, in models
that add many large values up; another choice of tokens changes far more."""


def require_same_in_parts(
    config: PretrainedConfig, hints: Hints, side: int, split: Split, parts: Sequence[Part], encoded: Encoded | None
) -> None:
    """Raise UnsupportedModelError, with the hint that helps, if they differ.

    ``split`` is that of the model's ``side``, found with ``hints``. ``parts`` are those of this side, the stem first;
    they need not go on to the head: what may differ is in the layers. Each is there only while it runs. It computes in
    F32, while its weights stay as they lie in the files.
    """
    if not _same(config, split, parts, encoded):
        raise UnsupportedModelError(DIFFERS)
    names = thresholds(config, sum(TOKENS))
    # All at once: only if that is no model, or not the same, it matters which of them it is.
    if names and not _same_if_small(config, hints, side, parts, encoded, names):
        for name in names:
            if _same_if_small(config, hints, side, parts, encoded, [name]) is False:
                raise UnsupportedModelError(DIFFERS)


def _same_if_small(
    config: PretrainedConfig,
    hints: Hints,
    side: int,
    parts: Sequence[Part],
    encoded: Encoded | None,
    names: Sequence[str],
) -> bool | None:
    """Of the model as if these numbers of its config were small; None if that is no model that runs."""
    changed = with_small(config, names)
    try:
        split = analyse_sides(changed, hints)[side]
        return not split.chunks or split.replays or _same(changed, split, parts, encoded)
    except UnsupportedModelError:
        return None


def _same(config: PretrainedConfig, split: Split, parts: Sequence[Part], encoded: Encoded | None) -> bool:
    limit = getattr(config.get_text_config(), LONGEST, None)
    total = min(sum(TOKENS), limit) if isinstance(limit, int) and limit > 0 else sum(TOKENS)
    if total < LEAST:
        return True
    sizes = [total * count // sum(TOKENS) for count in TOKENS[:-1]]
    sizes.append(total - sum(sizes))
    at_once, in_parts = _through(config, split, parts, encoded, sizes)
    return not any(_differ(one, other, sizes) for one, other in zip(at_once, in_parts, strict=True))


def _through(
    config: PretrainedConfig, split: Split, parts: Sequence[Part], encoded: Encoded | None, sizes: Sequence[int]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What comes out behind the last part: of the whole prompt, and of its last few tokens when these came alone."""
    total = sum(sizes)
    whole: list[tuple[Tensor, ...]] = []
    pieces: list[tuple[Tensor, ...]] = []
    for part in parts:
        narrow = Quantization({path.name: AS_PUBLISHED for path, _ in part.files})
        runner = part.runner(config, split, torch.float32, quantization=narrow)
        if not whole:
            ids = torch.randint(0, runner.vocabulary, (ROWS, total), generator=torch.Generator().manual_seed(1))
            whole = [(pack(ids),)]
            pieces = [(pack(piece),) for piece in torch.split(ids, list(sizes), dim=1)]
        given = None if encoded is None else _rows(encoded)
        try:
            sessions = [runner.open(ROWS, total, encoded=given) for _ in range(2)]
            whole = [step(runner, sessions[0], whole[0], total, Want.NONE)]
            pieces = [
                step(runner, sessions[1], piece, count, Want.NONE) for piece, count in zip(pieces, sizes, strict=True)
            ]
        except (RefusedError, RemoteProtocolError) as error:
            raise UnsupportedModelError(
                f"this model cannot be published: cut into parts it does not run ({error})"
            ) from error
        finally:
            runner.close()
    return [unpack(tensor) for tensor in whole[0]], [unpack(tensor) for tensor in pieces[-1]]


def _rows(encoded: Encoded) -> Encoded:
    """What an encoder made of one text, for each of the prompts."""
    return Encoded(encoded.states[:1].float().repeat(ROWS, 1, 1), encoded.mask[:1].repeat(ROWS, 1))


def _differ(at_once: torch.Tensor, last: torch.Tensor, sizes: Sequence[int]) -> bool:
    """Of values that there are for each token, along whichever dimension, those of the last few; of others nothing is
    said.
    """
    along = [dim for dim, size in enumerate(at_once.shape) if size == sum(sizes)]
    if len(along) != 1 or last.shape != (*at_once.shape[: along[0]], sizes[-1], *at_once.shape[along[0] + 1 :]):
        return False
    expected, found = at_once.narrow(along[0], sum(sizes) - sizes[-1], sizes[-1]).float(), last.float()
    same = (expected == found) | (expected.isnan() & found.isnan())
    difference = float((expected - found).abs().nan_to_num(torch.inf).masked_fill(same, 0.0).max())
    return difference > ALIKE * (1 + float(expected.abs().nan_to_num(0.0, posinf=0.0).max()))
