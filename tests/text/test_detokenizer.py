"""Text that comes token by token: whole characters only, stop texts across tokens, and in all what decoding gives."""

from collections.abc import Sequence

import pytest

from graftlm.text.tokenizer import TextStream, Tokenizer
from tiny import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Every byte is a token."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer(folder)
    return Tokenizer.from_folder(folder)


def pieces(tokenizer: Tokenizer, ids: Sequence[int], *stop: str) -> list[str]:
    stream = TextStream(tokenizer.decode, stop)
    found = []
    for token in ids:
        found.append(stream.add(token))
        if stream.stopped:
            return found
    return [*found, stream.finish()]


def test_characters_come_whole(tokenizer: Tokenizer) -> None:
    found = pieces(tokenizer, tokenizer.encode("a é €🙂."))
    assert found == [*"a ", "", "é", " ", "", "", "€", "", "", "", "🙂", ".", ""]


@pytest.mark.parametrize("text", [b"\xff\xfe\xfd\xfc\xfba", b"a\xe2\x82", b"\xf0\x9f\xf0\x9f\x99\x82", "�é�".encode()])
def test_broken_bytes_are_what_decoding_makes_of_them(tokenizer: Tokenizer, text: bytes) -> None:
    ids = [byte_tokens(tokenizer)[byte] for byte in text]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids) == text.decode(errors="replace")


def byte_tokens(tokenizer: Tokenizer) -> list[int]:
    """The token of each byte, by the name that ByteLevel gives it: its own character, or one from 256 on."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = [byte for byte in range(256) if byte not in shown]
    names = {tokenizer._backend.id_to_token(n): n for n in range(tokenizer.vocab_size)}
    return [names[chr(byte if byte in shown else 256 + rest.index(byte))] for byte in range(256)]


def test_a_stop_text_across_tokens_ends_it_and_is_no_part_of_it(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, tokenizer.encode("ab\n\nUser: x"), "\nUser:") == [*"ab", "", "\n", *[""] * 5]
    assert "".join(pieces(tokenizer, tokenizer.encode("ab\n\nUser: x"), "\nUser:")) == "ab\n"
    assert "".join(pieces(tokenizer, tokenizer.encode("aab aac"), "aac", "zz")) == "aab "
    assert "".join(pieces(tokenizer, tokenizer.encode("one é two"), "é")) == "one "
    assert "".join(pieces(tokenizer, tokenizer.encode("xyz"), "yz", "y")) == "x"


def test_the_beginning_of_a_stop_text_is_text_when_nothing_comes_behind_it(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, tokenizer.encode("ab\nUs"), "\nUser:") == ["a", "b", "", "", "", "\nUs"]
    assert pieces(tokenizer, tokenizer.encode("\nUs\nUser:"), "\nUser:")[:4] == ["", "", "", "\nUs"]


def test_a_decoder_that_drops_the_first_space_keeps_the_others() -> None:
    """As those of the Llama tokenizers do; control tokens have no text."""
    words = ["", "▁one", "▁two", "three"]

    def decode(ids: Sequence[int]) -> str:
        return "".join(words[n] for n in ids).replace("▁", " ").removeprefix(" ")

    stream = TextStream(decode)
    assert [stream.add(n) for n in (0, 1, 0, 0, 2, 3, 2)] == ["", "one", "", "", " two", "three", " two"]


def test_little_is_decoded_again(tokenizer: Tokenizer) -> None:
    lengths: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        lengths.append(len(ids))
        return tokenizer.decode(ids)

    stream = TextStream(decode)
    for token in tokenizer.encode("some text €🙂 " * 20):
        stream.add(token)
    assert max(lengths) <= 8
