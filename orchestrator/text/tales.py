"""Tales: short stories drawn from a small grammar, so that the best possible loss is known.

A language model's loss cannot fall below the entropy of its text, but nobody knows the entropy of
English. Here the text comes from a program, `tell`, and the probability of every word it says is
known exactly. So a nano GPT's loss can be drawn beside the floor it runs towards, and each story
the model writes can be checked for the first word that breaks the grammar.

What makes the stories worth a transformer: the hero, the friend, the thing and its colour, the
place, the animal and its food are each drawn once and come back many words later. A model
that sees two words back cannot know which; attention can look and copy.

`tell` is driven in three ways by what is passed as its `say`:
    to write a story   `write_story`       say draws one of the options
    to score a story   `log_probability`   say finds which option the text took, and adds its log p
    to check a story   `check`             say stops at the first word that no option begins with

The options of one choice always begin with different words, so a text can be read in one way only,
and its probability is one product, not a sum over derivations.
"""

import difflib
import math
import random
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

END_OF_TEXT = "<|endoftext|>"

# The floor, measured on 60,000 stories (the tests measure it again). Tokens are words, the marks
# "." and ",", and one end-of-text at the end, which costs nothing because the end is never in doubt.
NATS_PER_STORY = 29.639
TOKENS_PER_STORY = 61.00
NATS_PER_TOKEN = NATS_PER_STORY / TOKENS_PER_STORY  # 0.486

# No word is in two of these tables, so that a word says which question it answers.
# fmt: off
TIMES = (
    "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "morning", "evening",
    "afternoon",
)
CHARACTERS = ("brave", "kind", "clever", "shy", "cheerful", "curious", "gentle", "funny")
NAMES = {
    "girl": ("Ada", "Anna", "Clara", "Emma", "Grace", "Ivy", "Lily", "Maya", "Nora", "Zoe"),
    "boy": ("Adam", "Ben", "David", "Finn", "Hugo", "Jack", "Leo", "Max", "Noah", "Omar"),
}
FRIENDS = (
    "baker", "clown", "cook", "doctor", "farmer", "gardener", "knight", "painter", "pilot", "sailor",
    "shepherd", "singer", "tailor", "teacher", "wizard",
)
COLOURS = ("red", "blue", "green", "yellow", "purple", "silver", "golden", "white", "orange", "indigo")
THINGS = {
    "one": ("ball", "basket", "bell", "book", "drum", "flute", "hat", "kite", "lamp", "scarf"),
    "many": ("balloons", "boots", "gloves", "marbles", "pencils", "ribbons"),
}
PLACES = (
    "beach", "bridge", "castle", "fair", "farm", "harbor", "lake", "library", "market", "mill", "park",
    "river", "school", "station", "zoo",
)
MOODS = ("hungry", "lonely", "playful", "sleepy", "fluffy", "noisy", "old", "enormous")
ANIMALS = (
    "bear", "cat", "dog", "donkey", "duck", "fox", "goat", "goose", "monkey", "mouse", "otter", "owl",
    "parrot", "pony", "rabbit",
)
FOODS = ("bread", "cheese", "cake", "corn", "honey", "jam", "milk", "porridge", "soup", "toast")
# fmt: on

PRONOUNS = {"girl": ("she", "her"), "boy": ("he", "his")}
# For the checker's hints: the earlier word that decides this one.
DECIDED_BY = {"she": "girl", "her": "girl", "he": "boy", "his": "boy", "them": "some"}

Options = str | tuple[str, ...] | dict[str, float]  # fixed text, equal chances, or weights


def tell(say: Callable[[Options], str]) -> None:
    """Walk through one story: the whole grammar is this function.

    Args:
        say: is given the next words of the story (a text) or the options for them (a tuple where
            all are equally likely, a dict of weights where not), and returns the one that is said.
    """
    say("One")
    say(TIMES)
    say("a")
    say(CHARACTERS)
    child = say({"girl": 1, "boy": 1})
    he, his = PRONOUNS[child]
    say("named")
    name = say(NAMES[child])
    say(f"and {his} friend the")
    friend = say(FRIENDS)
    say(("took", "carried", "brought"))
    article, colour = say_with_article(say, COLOURS, plural_weight=0.6 * len(COLOURS))
    number = "many" if article == "some" else "one"
    it = "them" if number == "many" else "it"
    thing = say(THINGS[number])
    say("to the")
    place = say(PLACES)
    say(".")

    if say({"There": 1, "But": 1}) == "There":
        say(f"{he} lost the {thing}, but")
        say_with_article(say, MOODS)
        animal = say(ANIMALS)
        say(f"found {it}. {name}")
        say(("hugged", "thanked", "kissed"))
        say(f"the {animal} and gave it some")
        food = say(FOODS)
    else:
        say_with_article(say, MOODS)
        animal = say(ANIMALS)
        say(("stole", "grabbed", "snatched"))
        say(f"the {thing}. {name}")
        say(("cried", "shouted", "sighed"))
        say(f", but the {friend} gave the {animal} some")
        food = say(FOODS)
        say(f"and got {it} back")
    say(".")

    if say({"Now": 1, "Then": 1}) == "Now":
        say(f"{name}, the {friend} and the {animal}")
        say(("eat", "share", "enjoy"))
        say(f"{food} at the {place} every day.")
    else:
        say(f"the {child} left the {place} with the {friend}, the {animal} and {his} {colour} {thing}.")


def say_with_article(
    say: Callable[[Options], str], words: tuple[str, ...], plural_weight: float = 0
) -> tuple[str, str]:
    """Say "a", "an" or "some", then one of the words that may follow: (article, word).

    The article comes first and must not promise a sound that no word keeps, so it is drawn with
    the number of words that begin so; every word is then equally likely.
    """
    after_an = tuple(word for word in words if word[0] in "aeiou")
    after_a = tuple(word for word in words if word[0] not in "aeiou")
    weights = {"a": len(after_a), "an": len(after_an), "some": plural_weight}
    article = say({option: weight for option, weight in weights.items() if weight})
    return article, say({"a": after_a, "an": after_an, "some": words}[article])


def write_story(rng: random.Random) -> str:
    """Draw one story.

    Args:
        rng: the source of chance; the same state gives the same story.

    Returns:
        The story as English text, one paragraph, without an end-of-text mark.
    """
    words = []

    def say(options: Options) -> str:
        probabilities = _probabilities(options)
        said = rng.choices(list(probabilities), list(probabilities.values()))[0]
        words.extend(_split(said))
        return said

    tell(say)
    return _join(words)


def stories(count: int, seed: int) -> list[str]:
    """Draw a list of stories, for instance a held-out set under a seed that training never uses.

    Two independent stories are the same with a probability of about 2e-13, so lists drawn under
    different seeds have nothing in common in practice.

    Args:
        count: how many stories.
        seed: the same seed gives the same list.

    Returns:
        `count` stories.
    """
    rng = random.Random(seed)
    return [write_story(rng) for _ in range(count)]


def log_probability(story: str) -> float:
    """The exact natural logarithm of the probability that `write_story` draws this story.

    Minus this, divided by the number of tokens, is the loss that no model can beat on average. The
    end of the story is included and adds 0: after the last word nothing else can follow.

    Args:
        story: a complete story, without an end-of-text mark.

    Returns:
        The log-probability in nats; below 0.

    Raises:
        ValueError: the text is not a story of the grammar; the message says where and why.
    """
    fault = check(story)
    if fault is not None:
        raise ValueError(f"not a story of this grammar, so it has no log-probability: {fault}")
    return _read(_split(story)).log_probability


def check(text: str) -> str | None:
    """Say where a text first breaks the grammar.

    Args:
        text: any text at all.

    Returns:
        None for a complete story. Else one sentence: which word (marks count as words, the first
        is word 1), what was found, what was expected, and which earlier word decided that.
    """
    words = _split(text)
    reading = _read(words)
    if reading.words_read < len(words) or END_OF_TEXT not in reading.expected:
        found = repr(words[reading.words_read][:40]) if reading.words_read < len(words) else "the end of the text"
        return f"word {reading.words_read + 1}: found {found}, expected {_describe(reading)}"
    if text != _join(words):
        return "the words are a story, but the spaces are not: expected one between words and none before a mark"
    return None


def next_word_probabilities(prefix_words: Sequence[str]) -> dict[str, float]:
    """The exact distribution of the next word: what a perfect model would predict.

    Args:
        prefix_words: the first words of a story, marks included; may be empty.

    Returns:
        The words that can follow, with probabilities that sum to 1; after a complete story only
        `END_OF_TEXT`.

    Raises:
        ValueError: the prefix begins no story.
    """
    reading = _read(prefix_words)
    if reading.words_read < len(prefix_words):
        raise ValueError(
            f"no story begins so: word {reading.words_read + 1} is "
            f"{prefix_words[reading.words_read]!r}, expected {_describe(reading)}"
        )
    return reading.expected


class TalesTokenizer:
    """One token for each word or mark: the smallest tokenizer that can be read by eye.

    GPT-2's byte-pair encoding would spend its 50,257 entries on about 180 words. Spaces follow from
    a rule (none before a mark), so that a story comes back from its tokens exactly.

    Attributes:
        vocab_size: number of tokens.
        end_of_text: the id of `<|endoftext|>`, before the first word and after the last.
    """

    def __init__(self) -> None:
        self._words = [END_OF_TEXT, *_vocabulary()]
        self._ids = {word: index for index, word in enumerate(self._words)}
        self.vocab_size = len(self._words)
        self.end_of_text = self._ids[END_OF_TEXT]

    def encode(self, text: str) -> list[int]:
        """Turn text into token ids.

        Args:
            text: words of the tales, marks, and `<|endoftext|>`.

        Returns:
            One id for each.

        Raises:
            ValueError: a word is not in the vocabulary; the message names a similar one that is.
        """
        words = _split(text)
        for word in words:
            if word not in self._ids:
                similar = difflib.get_close_matches(word, self._words, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"{word!r} is not one of the {self.vocab_size} words of the tales; "
                    f"the most similar one is {similar!r}"
                )
        return [self._ids[word] for word in words]

    def decode(self, ids: Iterable[int]) -> str:
        """Turn token ids into text.

        Args:
            ids: token ids, each from 0 to `vocab_size` - 1.

        Returns:
            The words, with a space between them and none before a mark or around `<|endoftext|>`.

        Raises:
            ValueError: an id is out of range.
        """
        ids = [int(index) for index in ids]
        for index in ids:
            if not 0 <= index < self.vocab_size:
                raise ValueError(f"token id {index} is out of range: the ids go from 0 to {self.vocab_size - 1}")
        return _join([self._words[index] for index in ids])


class _Reading(NamedTuple):
    """How far a text follows the grammar, and what the grammar expects there."""

    log_probability: float  # of the words that fit
    words_read: int
    expected: dict[str, float]  # next words and their probabilities
    chosen: dict[str, int]  # words that were one of several options -> their number in the text


class _MismatchError(Exception):
    """Leaves `tell` at the first word that does not fit; carries what would have fitted."""


def _read(words: Sequence[str]) -> _Reading:
    """Follow `tell` along these words until they end or do not fit."""
    position, log_p, chosen = 0, 0.0, {}

    def say(options: Options) -> str:
        nonlocal position, log_p
        probabilities = _probabilities(options)
        by_first_word = {_split(option)[0]: option for option in probabilities}
        found = words[position] if position < len(words) else None
        if found not in by_first_word:
            raise _MismatchError({first: probabilities[option] for first, option in by_first_word.items()})
        said = by_first_word[found]
        log_p += math.log(probabilities[said])
        if len(probabilities) > 1:
            chosen.setdefault(found, position + 1)
        for word in _split(said):
            if position == len(words) or words[position] != word:
                raise _MismatchError({word: 1.0})
            position += 1
        return said

    try:
        tell(say)
        expected = {END_OF_TEXT: 1.0}
    except _MismatchError as stop:
        (expected,) = stop.args
    return _Reading(log_p, position, expected, chosen)


def _describe(reading: _Reading) -> str:
    """The expected words as part of a sentence, with the earlier word that decided a single one."""
    if END_OF_TEXT in reading.expected:
        return "the end of the story"
    options = [repr(word) for word in reading.expected]
    if len(options) > 5:
        return f"one of {', '.join(options[:5])} and {len(options) - 5} more"
    if len(options) > 1:
        return f"one of {', '.join(options)}"
    (word,) = reading.expected
    cause = DECIDED_BY.get(word.lower(), word)
    hint = f", because word {reading.chosen[cause]} is {cause!r}" if cause in reading.chosen else ""
    return options[0] + hint


def _probabilities(options: Options) -> dict[str, float]:
    """Fixed text, equal chances or weights, all as option -> probability."""
    if isinstance(options, str):
        return {options: 1.0}
    if isinstance(options, tuple):
        return dict.fromkeys(options, 1 / len(options))
    total = sum(options.values())
    return {option: weight / total for option, weight in options.items()}


def _split(text: str) -> list[str]:
    """Words and marks of a text; every character that is not a space lands in one of them."""
    return re.findall(r"<\|endoftext\|>|\w+|[^\w\s]", text)


def _join(words: Sequence[str]) -> str:
    """The inverse of `_split` for a text that is spaced as stories are."""
    text = " ".join(words)
    return re.sub(r" (?=[.,])| ?(<\|endoftext\|>) ?", r"\1", text)


def _vocabulary() -> list[str]:
    """Every word the grammar can say, in alphabetical order.

    Each walk notes all options of each choice it meets, not only the one it takes, so a few
    hundred walks meet everything many times over (the tests draw 20,000 stories against it).
    """
    rng, words = random.Random(0), set()

    def say(options: Options) -> str:
        probabilities = _probabilities(options)
        words.update(word for option in probabilities for word in _split(option))
        return rng.choice(list(probabilities))

    for _ in range(300):
        tell(say)
    return sorted(words)
