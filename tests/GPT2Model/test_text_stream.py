"""Text shown token by token is the text of all tokens: never half a character, never a part of a stop string."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from GPT2Model.text_stream import TextStream, check_stop_strings
from GPT2Model.tokenizer import get_tokenizer
from orchestrator.text.tales import TalesTokenizer
from orchestrator.text.tokenizers import BytesTokenizer, CharTokenizer

GPT2, BYTES, TALES = get_tokenizer(), BytesTokenizer(), TalesTokenizer()
CHARS = CharTokenizer("".join(sorted("ab é🙂\ufffd")))
TOKENIZERS = {"gpt2": GPT2, "bytes": BYTES, "tales": TALES, "char": CHARS}
# Of GPT-2's vocabulary the 256 single bytes make broken and whole characters; the others, words.
ANY_ID = {
    name: st.integers(0, tokenizer.vocab_size - 1) | st.integers(0, min(255, tokenizer.vocab_size - 1))
    for name, tokenizer in TOKENIZERS.items()
}
PIECES = st.sampled_from(["a", " b", "é", "日本", "🙂", "👩‍👩‍👧", "\n", "\u0301", "<|endoftext|>", " the"])


def streamed(tokenizer, ids, stop=()) -> tuple[str, TextStream]:
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push(id) for id in ids]
    return "".join(pieces) + stream.finish(), stream


def cut(text: str, stop: tuple[str, ...]) -> str:
    """The text up to the stop string that is complete first, read one character after the other."""
    for end in range(1, len(text) + 1):
        ended = [one for one in stop if text[:end].endswith(one)]
        if ended:
            return text[: end - max(map(len, ended))]
    return text


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_the_pieces_of_any_tokens_are_the_text_of_all_of_them(name, data):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(ANY_ID[name], max_size=60))
    text, stream = streamed(tokenizer, ids)
    assert text == tokenizer.decode(ids)
    assert stream.text == text
    assert not stream.stopped


@pytest.mark.parametrize("tokenizer", [GPT2, BYTES], ids=["gpt2", "bytes"])
@settings(max_examples=80, deadline=None)
@given(pieces=st.lists(PIECES, max_size=25), lost=st.lists(st.integers(0, 200), max_size=3))
@example(pieces=["🙂"] * 25, lost=[])
@example(pieces=["🙂"] * 25, lost=[1, 4, 50])
def test_so_are_those_of_long_characters_also_with_tokens_missing(tokenizer, pieces, lost):
    ids = tokenizer.encode("".join(pieces))
    for place in lost:
        del ids[place : place + 1]
    assert streamed(tokenizer, ids)[0] == tokenizer.decode(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_with_stop_strings_they_are_the_text_before_the_first_to_be_complete(name, data):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(ANY_ID[name], min_size=1, max_size=40))
    whole = tokenizer.decode(ids)
    place = st.integers(0, len(whole))
    spans = st.tuples(place, st.integers(1, 12)).map(lambda span: whole[span[0] : sum(span)])
    stop = tuple(one for one in data.draw(st.lists(spans | st.text("ab é", max_size=3), max_size=3)) if one)
    text, stream = streamed(tokenizer, ids, stop)
    assert text == stream.text == cut(whole, stop)
    assert stream.stopped == any(one in whole for one in stop)


@settings(max_examples=100, deadline=None)
@given(text=st.lists(PIECES, max_size=15).map("".join), stop=st.sampled_from([(), ("ab",), (" b b", "é")]))
def test_what_was_shown_is_never_taken_back_and_never_half_a_character(text, stop):
    """After each token the text so far is the beginning of the whole text, so that no U+FFFD stands for a part."""
    stream, whole = TextStream(BYTES, stop), cut(text, stop)
    for id in BYTES.encode(text):
        stream.push(id)
        assert whole.startswith(stream.text)


def test_half_a_character_waits_for_the_other_half():
    stream = TextStream(BYTES)
    assert [stream.push(id) for id in "é🙂x".encode()] == ["", "é", "", "", "", "🙂", "x"]


def test_bytes_that_are_no_character_are_shown_with_the_next_one_or_at_the_end():
    stream = TextStream(BYTES)
    assert [stream.push(id) for id in (0xFF, 0xFF, ord("a"), 0xE2, 0x82)] == ["", "\ufffd", "\ufffda", "", ""]
    assert stream.finish() == "\ufffd"


def test_a_character_is_put_together_also_around_tokens_without_any_text():
    class WithSilentTokens:
        def decode(self, ids):
            return BYTES.decode([id for id in ids if id != 300])

    ids = [id for byte in "aé🙂".encode() for id in [byte] + 40 * [300]]
    assert streamed(WithSilentTokens(), ids)[0] == "aé🙂"


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.sampled_from([0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x99, 0x41]), min_size=30, max_size=120))
def test_where_the_window_is_cut_shows_nowhere_also_in_broken_text(ids):
    assert streamed(BYTES, ids)[0] == BYTES.decode(ids)


def test_words_of_the_tales_get_their_space_with_the_word_behind_it():
    stream = TextStream(TALES)
    pieces = [stream.push(id) for id in TALES.encode("a brave girl. But")]
    assert pieces == ["a", " brave", " girl", ".", " But"]


def test_a_stop_string_over_several_tokens_is_never_shown_in_part():
    stream = TextStream(CHARS, ("aab",))
    assert [stream.push(id) for id in CHARS.encode("b aaab a")] == ["b", " ", "", "", "a", "", "", ""]
    assert stream.stopped
    assert stream.text == "b a"
    assert stream.finish() == ""


def test_what_might_have_become_a_stop_is_shown_at_the_end():
    stream = TextStream(CHARS, ("aab", "é🙂"))
    assert [stream.push(id) for id in CHARS.encode("aa")] == ["", ""]
    assert stream.finish() == "aa"
    assert stream.text == "aa"
    assert not stream.stopped


@pytest.mark.parametrize(
    ("stop", "text"), [(("b", "ab"), "é"), (("ab", "b"), "é"), (("ab ", "b"), "éa"), (("éab 🙂", "b "), "éa")]
)
def test_of_several_stops_the_first_to_be_complete_wins_and_of_two_at_once_the_longer(stop, text):
    assert streamed(CHARS, CHARS.encode("éab 🙂"), stop)[0] == text
    assert streamed(GPT2, GPT2.encode("éab 🙂"), stop)[0] == text  # whatever lies in one token


def test_a_stop_may_be_given_alone_and_nonsense_is_refused():
    assert streamed(CHARS, CHARS.encode("a b"), " ")[0] == "a"
    with pytest.raises(ValueError, match="a character at least"):
        TextStream(CHARS, ("a", ""))
    with pytest.raises(TypeError, match="stop_tokens"):
        check_stop_strings(("a", 3))


def test_no_token_is_taken_behind_the_end():
    stream = TextStream(CHARS)
    stream.push(0)
    stream.finish()
    assert stream.finish() == ""
    with pytest.raises(RuntimeError, match="new TextStream"):
        stream.push(0)


@pytest.mark.parametrize(
    "ids", [[100] * 3000, [0xFF] * 3000, list("🙂".encode()) * 750], ids=["ascii", "broken", "long"]
)
def test_each_token_costs_a_few_tokens_of_decoding_however_long_the_text_is(ids):
    decoded = []

    class Counting:
        def decode(self, some):
            decoded.append(len(some))
            return BYTES.decode(some)

    streamed(Counting(), ids)
    assert sum(decoded) <= 36 * len(ids)
    assert max(decoded) <= 36
