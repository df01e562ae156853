"""TextStream: tokens come in one at a time, and the text that may be shown comes out.

Two things make that more than `decode([id])`. A token of a byte-level tokenizer may hold half a character, and how a
token is spelled may depend on the one before (a tokenizer of words puts spaces between). And a stop string may lie
across several tokens: what could still become one is held back until it has, or cannot any more.
"""

from collections.abc import Sequence

REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are no UTF-8, and for a character that is still incomplete
CONTEXT = 16  # tokens that are decoded again with each new one, at least: four characters of four bytes each


class TextStream:
    """The text of a growing list of tokens, piece by piece.

    All pieces together are `tokenizer.decode(all ids)`, cut before the first stop string. Each push decodes a few
    tokens and never the whole text, so that a long text costs no more for each token than a short one.

    Args:
        tokenizer: anything with `.decode(ids) -> str`, where more ids only ever add text behind (but may complete a
            last character that was shown as U+FFFD).
        stop: texts before which the text ends; one, or several. The first to be complete wins, wherever tokens end; of
            two that are complete with the same character, the longer.
    Attributes:
        stopped: whether a stop string came. What is pushed afterwards is ignored.
        text: all that was shown so far.
    Raises:
        TypeError: a stop that is no str. ValueError: an empty one.
    """

    def __init__(self, tokenizer, stop: str | Sequence[str] = ()):
        self.stop = check_stop_strings(stop)
        self.stopped, self.finished, self._pieces = False, False, []
        self._tokenizer = tokenizer
        self._window: list[int] = []  # the last ids
        self._read = 0  # characters of the window's text that were taken
        self._held = ""  # taken, and not shown: it may become a stop string

    @property
    def text(self) -> str:
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def push(self, id: int) -> str:
        """What may be shown now that this token is known: often its text, at times nothing, at times more.

        Raises:
            RuntimeError: the stream was finished. ValueError: an id outside the tokenizer's vocabulary.
        """
        if self.finished:
            raise RuntimeError("this text is finished: take a new TextStream for another one.")
        if self.stopped:
            return ""
        self._window.append(int(id))
        text = self._tokenizer.decode(self._window)
        # Only the last character can still change, and only if it is incomplete: a UTF-8 decoder shows all bytes of an
        # incomplete character as one U+FFFD. If it was really invalid, the next character comes behind it.
        end = len(text) - text.endswith(REPLACEMENT)
        new, self._read = text[self._read : end], max(self._read, end)
        if len(self._window) >= 2 * CONTEXT:
            self._forget(text)
        return self._show(new)

    def finish(self) -> str:
        """The rest: no token follows, so half a character is shown as U+FFFD and what was held back is let go."""
        ended, self.finished = self.finished or self.stopped, True
        if ended:
            return ""
        rest = self._show(self._tokenizer.decode(self._window)[self._read :])
        held, self._held = self._held, ""  # empty after a stop
        self._pieces.append(held)
        return rest + held

    def _forget(self, text: str) -> None:
        """Drop old tokens from the window. A character that this cuts is one that was shown; the end stays the same."""
        window = self._window[-CONTEXT:]
        shorter = self._tokenizer.decode(window)
        # Four characters are four bytes at least, so that an incomplete one at the end lies wholly behind the cut. (Of
        # tokens without any text, more are needed.)
        if len(shorter) >= 4:
            self._window, self._read = window, self._read - (len(text) - len(shorter))

    def _show(self, new: str) -> str:
        """Of what was held and `new`: the part before a stop string, or before what may become one."""
        text = self._held + new
        found = [(start + len(stop), start) for stop in self.stop if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, shown, self._held = True, text[: min(found)[1]], ""
        else:
            held = beginning_of_a_stop(text, self.stop)
            shown, self._held = text[: len(text) - held], text[len(text) - held :]
        self._pieces.append(shown)
        return shown


def beginning_of_a_stop(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    longest = max((len(one) - 1 for one in stop), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        end = text[-length:]
        if any(one.startswith(end) for one in stop):
            return length
    return 0


def check_stop_strings(stop) -> tuple[str, ...]:
    """The stop strings as a tuple; one alone may be given as it is. Of no type, since it is what looks at the types.

    Raises:
        TypeError: what is no text. ValueError: an empty text, which would end every text before it begins.
    """
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    wrong = [one for one in stop if not isinstance(one, str)]
    if wrong:
        raise TypeError(f"stop strings are texts, got {wrong[0]!r}: a token's id goes into stop_tokens.")
    if "" in stop:
        raise ValueError("a stop string must have a character at least: leave the empty one out.")
    return stop
