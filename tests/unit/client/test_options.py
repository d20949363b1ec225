from __future__ import annotations

from typing import Any

import pytest

from torrentlm.client.options import options_of, text_of
from torrentlm.records import RANGES
from torrentlm.wire.messages import Generate, decode_message, encode_message


def test_what_is_not_said_keeps_its_default() -> None:
    options = options_of({"temperature": 1, "stop": "\n"})
    assert options.sampling.temperature == 1 and options.sampling.top_p == 1.0
    assert options.stop.strings == ("\n",)
    assert options_of({"stop": ["a", "b"]}).stop.strings == ("a", "b")


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ({"max_tokens": 5}, TypeError, "did you mean 'max_new_tokens'"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens is a whole number from 1"),
        ({"max_new_tokens": 1.5}, TypeError, "max_new_tokens is a whole number, not float"),
        ({"max_new_tokens": True}, TypeError, "not bool"),
        ({"temperature": -1}, ValueError, "from 0 to 1000, not -1"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"top_p": "0.9"}, TypeError, "top_p is a number, not str"),
        ({"seed": -1}, ValueError, "seed"),
        ({"stop": 5}, TypeError, "a text or a list of texts"),
        ({"stop": [5]}, TypeError, "a text or a list of texts"),
        ({"stop": ""}, ValueError, "1 to 256 bytes"),
        ({"stop": ["x"] * 17}, ValueError, "up to 16 texts"),
    ],
)
def test_what_cannot_be_meant_is_refused(how: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        options_of(how)


@pytest.mark.parametrize("name", RANGES)
def test_both_ends_of_every_range_travel(name: str) -> None:
    for value in RANGES[name]:
        options = options_of({name: value})  # type: ignore[misc]
        message = Generate(b"s" * 16, 1, 0, options.max_new_tokens, options.sampling, options.stop)
        encoded = encode_message(message)
        again = decode_message(b"".join(bytes(part) for part in encoded.parts))
        assert again[0] == message


def test_a_prompt_is_text() -> None:
    assert text_of("x") == "x"
    with pytest.raises(TypeError, match="not NoneType"):
        text_of(None)
