"""Text that comes token by token: whole characters only, stop texts across tokens, and in all what decoding gives."""

import random
from collections.abc import Callable, Sequence

import pytest

from graftlm.text.stream import PlacedToken, TextStream, TokenStream
from graftlm.text.tokenizer import Tokenizer
from tiny import PIECES, byte_tokenizer, piece_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Every byte is a token."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer(folder)
    return Tokenizer.from_folder(folder)


def pieces(tokenizer: Tokenizer, ids: Sequence[int], *stop: str) -> list[str]:
    stream = TextStream(tokenizer, (), stop)
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


@pytest.fixture(scope="module", params=PIECES)
def of_pieces(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Tokenizers of SentencePiece's kind, with byte tokens, and two special tokens in the middle of a text."""
    folder = tmp_path_factory.mktemp(request.param)
    piece_tokenizer(folder, request.param, ["one two three", "threefold", "é 🙂"] * 9, "<|a|>")
    return Tokenizer.from_folder(folder)


def random_ids(tokenizer: Tokenizer, chance: random.Random) -> list[int]:
    """Any tokens: words, bytes that are characters or parts of them, special tokens, an id without a token."""
    kinds: list[Callable[[], list[int]]] = [
        lambda: [chance.randrange(tokenizer.vocab_size)],
        lambda: [chance.choice(sorted(tokenizer.special_ids))],
        lambda: [chance.randrange(256) + 4],
        lambda: tokenizer.encode(chance.choice(["漢字", "\U0001d518", "é", " two", "\n\n", "🙂 one"])),
        lambda: [10**6],
    ]
    return [index for _ in range(chance.randint(1, 12)) for index in chance.choices(kinds, (4, 1, 4, 4, 1))[0]()]


@pytest.mark.parametrize("prompt", ["", "one", "one "])
def test_any_tokens_streamed_are_what_decoding_makes_of_them(
    prompt: str, tokenizer: Tokenizer, of_pieces: Tokenizer
) -> None:
    chance = random.Random(5)
    for each in (tokenizer, of_pieces):
        before = each.encode_prompt(prompt)
        for _ in range(80):
            ids = random_ids(each, chance)
            stream = TokenStream(each, before)
            found, placed = "", []
            for token in ids:
                found += stream.add(token)
                placed += stream.take()
                assert all(place.offset < len(found) for place in placed)
            found += stream.finish()
            placed += stream.take()
            assert found == each.decode(ids, before), ids
            assert [place.token for place in placed] == ids
            check_places(found, placed)


def check_places(text: str, placed: Sequence[PlacedToken]) -> None:
    """Each token begins at the character that it says."""
    assert [place.offset for place in placed] == sorted(place.offset for place in placed)
    for place, after in zip(placed, [*placed[1:], None], strict=True):
        end = len(text) if after is None else after.offset
        written = (place.piece or b"").decode(errors="replace")
        if written and "\ufffd" not in written:
            assert text[place.offset :].startswith((written, "\ufffd")) and end == place.offset + len(written)
        assert place.offset <= len(text)


def test_bytes_are_held_back_until_another_token_follows(of_pieces: Tokenizer) -> None:
    names = {of_pieces._backend.id_to_token(n): n for n in range(of_pieces.vocab_size)}
    good, bad = [names["<0xC3>"], names["<0xA9>"]], names["<0xFF>"]
    word = of_pieces.encode("one")[-1]
    for ids, text in (([*good, word], "é"), ([*good, bad, word], "\ufffd" * 3)):
        stream = TextStream(of_pieces, [word])
        assert [stream.add(token) for token in ids][:-1] == [""] * (len(ids) - 1)
        assert stream._ids == [] and of_pieces.decode(ids, [word]).startswith(text)
    assert "".join(pieces(of_pieces, [word, *good, bad], "é")).rstrip() in ("one", "e", "ne", of_pieces.decode([word]))


def test_a_stop_text_of_byte_tokens_stops_at_once(of_pieces: Tokenizer) -> None:
    newline = of_pieces.encode("\n")[-1]
    assert of_pieces.is_fallback(newline)
    ids = [*of_pieces.encode("one"), newline, newline, *of_pieces.encode("two")]
    stream, count = TextStream(of_pieces, (), ["\n\n"]), 0
    found = ""
    while not stream.stopped:
        found += stream.add(ids[count])
        count += 1
    assert found == "one" and ids[count - 1] == newline and stream.finish() == ""


def test_tokens_of_a_stop_text_have_no_place(tokenizer: Tokenizer) -> None:
    for text, stop, kept in (("one END two", " END", "one"), ("é🙂x", "🙂", "é"), ("abc", "abc", "")):
        ids = tokenizer.encode(text)
        stream, placed, found = TokenStream(tokenizer, (), [stop]), [], ""
        for token in ids:
            found += stream.add(token)
            placed += stream.take()
        assert found + stream.finish() == kept and stream.stopped
        placed += stream.take()
        assert b"".join(place.piece or b"" for place in placed) == kept.encode()


def test_the_space_of_a_prompt_is_not_counted(tokenizer: Tokenizer) -> None:
    stream = TokenStream(tokenizer, (), space="  ")
    found = "".join([*map(stream.add, tokenizer.encode("  ab")), stream.finish()])
    assert found == "ab" and [place.offset for place in stream.take()] == [0, 0, 0, 1]


def test_little_is_decoded_again(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    plain = Tokenizer.decode

    def decode(self: Tokenizer, ids: Sequence[int], prompt: Sequence[int] = ()) -> str:
        lengths.append(len(ids))
        return plain(self, ids, prompt)

    monkeypatch.setattr(Tokenizer, "decode", decode)
    stream = TextStream(tokenizer)
    for token in tokenizer.encode("some text €🙂 " * 20):
        stream.add(token)
    assert max(lengths) <= 4
