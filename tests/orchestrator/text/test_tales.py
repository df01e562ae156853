"""Statements about the tales: their probabilities are exact, their checker is strict, their words return."""

import math
import random
from collections import Counter
from itertools import pairwise

import pytest

from orchestrator.text import tales
from orchestrator.text.tales import END_OF_TEXT, TalesTokenizer

LOST = (
    "One Monday a shy girl named Anna and her friend the baker took some red boots to the lake. "
    "There she lost the boots, but an old fox found them. Anna thanked the fox and gave it some jam. "
    "Now Anna, the baker and the fox share jam at the lake every day."
)
STOLEN = (
    "One evening a funny boy named Leo and his friend the pilot carried an orange kite to the zoo. "
    "But a noisy owl stole the kite. Leo sighed, but the pilot gave the owl some soup and got it back. "
    "Then the boy left the zoo with the pilot, the owl and his orange kite."
)


@pytest.fixture(scope="module")
def many_stories() -> list[str]:
    return tales.stories(20_000, seed=1)


@pytest.fixture(scope="module")
def held_out() -> list[str]:
    return tales.stories(1_000, seed=2)


def words_of(text: str) -> list[str]:
    """Words and marks, without the module's own splitter."""
    return text.replace(",", " ,").replace(".", " .").split()


# --- probabilities ---------------------------------------------------------------------------------


def test_the_probability_of_a_story_is_the_product_of_its_choices_counted_by_hand():
    # Monday, shy, girl, Anna, baker, took | "some", red, boots, lake | There, "an", old, fox, thanked, jam | Now, share
    opening = 1 / 10 * 1 / 8 * 1 / 2 * 1 / 10 * 1 / 15 * 1 / 3
    thing_and_place = 6 / 16 * 1 / 10 * 1 / 6 * 1 / 15
    plot = 1 / 2 * 2 / 8 * 1 / 2 * 1 / 15 * 1 / 3 * 1 / 10
    ending = 1 / 2 * 1 / 3
    by_hand = math.log(opening * thing_and_place * plot * ending)
    assert tales.log_probability(LOST) == pytest.approx(by_hand, abs=1e-9)


def test_next_word_probabilities_sum_to_one_and_multiply_to_the_probability_of_the_story(held_out):
    for story in [LOST, STOLEN, *held_out[:30]]:
        words = [*words_of(story), END_OF_TEXT]
        total = 0.0
        for position, word in enumerate(words):
            probabilities = tales.next_word_probabilities(words[:position])
            assert sum(probabilities.values()) == pytest.approx(1, abs=1e-12)
            total += math.log(probabilities[word])
        assert total == pytest.approx(tales.log_probability(story), abs=1e-9)


def test_words_are_drawn_as_often_as_their_probabilities_say(many_stories):
    """Six depths, weighted choices among them: each frequency within 4 standard errors of its probability."""
    texts = [words_of(story) for story in many_stories]
    for depth, prefix in [(1, ["One"]), (13, None), (14, None), (20, None), (21, None), (45, None)]:
        # A depth without a prefix: the mean of the exact distributions over the stories that were drawn.
        sample = texts if prefix else texts[:2_000]
        seen = Counter(text[depth] for text in sample)
        expected = Counter()
        for text in sample[:1] if prefix else sample:
            for word, probability in tales.next_word_probabilities(prefix or text[:depth]).items():
                expected[word] += probability * (len(sample) if prefix else 1)
        assert set(seen) <= set(expected)
        for word, count in expected.items():
            assert abs(seen[word] - count) <= 4 * math.sqrt(count) + 1e-6, (depth, word, seen[word], count)


def test_the_options_of_every_choice_begin_with_different_words():
    """So one text has one derivation; 2,000 walks take every branch hundreds of times."""
    rng = random.Random(0)

    def say(options):
        phrases = [options] if isinstance(options, str) else list(options)
        first_words = [words_of(phrase)[0] for phrase in phrases]
        assert len(set(first_words)) == len(first_words), f"two options begin alike: {first_words}"
        return rng.choice(phrases)

    for _ in range(2_000):
        tales.tell(say)


def test_the_floor_in_the_module_is_the_entropy_of_the_stories(many_stories):
    nats = -sum(map(tales.log_probability, many_stories[:4_000])) / 4_000
    tokens = sum(len(words_of(story)) + 1 for story in many_stories) / len(many_stories)
    assert nats == pytest.approx(tales.NATS_PER_STORY, abs=0.06)  # 5 standard errors
    assert tokens == pytest.approx(tales.TOKENS_PER_STORY, abs=0.05)
    assert nats / tokens == pytest.approx(tales.NATS_PER_TOKEN, abs=0.002)


# --- what makes them worth a transformer -------------------------------------------------------------


def test_a_trigram_model_is_at_least_four_tenths_of_a_nat_worse_than_the_floor(many_stories, held_out):
    """Witten-Bell interpolation of three, two and one words, each story read from its start token."""

    def padded(story):
        return [END_OF_TEXT, END_OF_TEXT, *words_of(story), END_OF_TEXT]

    ngrams = [Counter(), Counter(), Counter()]  # of one, two and three words
    for story in many_stories:
        words = padded(story)
        ngrams[0].update(zip(words[2:]))
        ngrams[1].update(pairwise(words[1:]))
        ngrams[2].update(zip(words, words[1:], words[2:], strict=False))
    context_counts, continuations = Counter(), Counter()
    for counts in ngrams:
        for ngram, count in counts.items():
            context_counts[ngram[:-1]] += count
            continuations[ngram[:-1]] += 1

    nats, tokens = 0.0, 0
    for story in held_out:
        words = padded(story)
        for position in range(2, len(words)):
            probability = 1 / len(ngrams[0])
            for order, counts in enumerate(ngrams):
                ngram = tuple(words[position - order : position + 1])
                seen, kinds = context_counts[ngram[:-1]], continuations[ngram[:-1]]
                if seen:
                    probability = (counts[ngram] + kinds * probability) / (seen + kinds)
            nats -= math.log(probability)
            tokens += 1
    floor = -sum(map(tales.log_probability, held_out)) / tokens
    assert nats / tokens - floor > 0.4
    assert nats / tokens < 3 * floor  # the trigram model itself is sound: far below log(177) = 5.2


def test_hero_friend_animal_place_thing_and_food_return_at_least_eight_words_later(held_out):
    tables = {
        "hero": sum(tales.NAMES.values(), ()),
        "friend": tales.FRIENDS,
        "animal": tales.ANIMALS,
        "place": tales.PLACES,
        "thing": sum(tales.THINGS.values(), ()),
        "food": tales.FOODS,
        "colour": tales.COLOURS,
    }
    returned = Counter()
    for story in held_out:
        words = words_of(story)
        for role, table in tables.items():
            places = [index for index, word in enumerate(words) if word in table]
            assert len({words[index] for index in places}) == 1, f"two words for one {role}: {story}"
            returned[role] += places[-1] - places[0] >= 8
    for role in ("hero", "friend", "animal", "place"):
        assert returned[role] == len(held_out), role
    assert min(returned.values()) > 0.25 * len(held_out), returned


def test_pronouns_agree_with_the_hero_and_with_one_or_many_things(held_out):
    for story in held_out:
        words = words_of(story)
        other = {"he", "his", "him"} if "girl" in words else {"she", "her"}
        assert not other & set(words), story
        assert ("them" in words) == any(thing in words for thing in tales.THINGS["many"]), story


def test_a_and_an_follow_the_first_sound_of_the_next_word(held_out):
    seen = Counter()
    for story in held_out:
        for article, following in pairwise(words_of(story)):
            if article in ("a", "an"):
                assert (article == "an") == (following[0] in "aeiou"), (article, following)
                seen[article] += 1
    assert min(seen["a"], seen["an"]) > 100


def test_at_least_150_words_occur_in_the_first_300_stories_and_none_is_hidden_in_the_tail(many_stories):
    counts = Counter(word for story in many_stories[:300] for word in words_of(story))
    assert len(counts) >= 150
    assert len(counts) + 1 == TalesTokenizer().vocab_size  # and <|endoftext|>
    assert min(counts.values()) >= 5


def test_stories_under_other_seeds_have_nothing_in_common_and_under_one_seed_everything(many_stories, held_out):
    assert len(set(many_stories)) == len(many_stories)
    assert not set(many_stories) & set(held_out)
    assert tales.stories(5, seed=1) == many_stories[:5] == [tales.write_story(rng) for rng in [random.Random(1)] * 5]


# --- the checker ---------------------------------------------------------------------------------------


def test_every_story_that_is_written_passes_the_check(many_stories):
    assert tales.check(LOST) is tales.check(STOLEN) is None
    assert [fault for story in many_stories[:3_000] if (fault := tales.check(story))] == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (LOST.replace("Now Anna", "Now Clara"), "word 45: found 'Clara', expected 'Anna', because word 7 is 'Anna'"),
        (LOST.replace("There she", "There he"), "word 22: found 'he', expected 'she', because word 5 is 'girl'"),
        (LOST.replace("her friend", "his friend"), "word 9: found 'his', expected 'her', because word 5 is 'girl'"),
        (LOST.replace("found them", "found it"), "word 32: found 'it', expected 'them', because word 14 is 'some'"),
        (LOST.replace("an old", "a old"), "word 29: found 'old', expected one of "),
        (LOST.replace("the lake every", "the zoo every"), "found 'zoo', expected 'lake', because word 19 is 'lake'"),
        (
            LOST.replace("a shy girl", "a girl"),
            "word 4: found 'girl', expected one of 'brave', 'kind', 'clever', 'shy', 'cheerful' and 3 more",
        ),
        (STOLEN.replace("the owl and", "the fox and"), "found 'fox', expected 'owl', because word 24 is 'owl'"),
        (STOLEN.replace("his orange", "his red"), "found 'red', expected 'orange', because word 15 is 'orange'"),
        (LOST + " Anna", "found 'Anna', expected the end of the story"),
        (LOST + END_OF_TEXT, "found '<|endoftext|>', expected the end of the story"),
        (LOST[:-1], "found the end of the text, expected '.'"),
        ("", "word 1: found the end of the text, expected 'One'"),
        (LOST.replace(" the lake", "  the lake"), "spaces"),
        (LOST + "\n", "spaces"),
    ],
)
def test_a_changed_story_is_reported_with_the_word_and_the_reason(changed, message):
    assert changed not in (LOST, STOLEN)
    assert message in tales.check(changed)
    with pytest.raises(ValueError, match="not a story of this grammar"):
        tales.log_probability(changed)


def test_a_story_that_lost_one_word_or_ends_early_is_never_accepted(held_out):
    for story in held_out[:20]:
        words = words_of(story)
        for position in range(len(words)):
            for shorter in (words[:position] + words[position + 1 :], words[:position]):
                text = " ".join(shorter).replace(" .", ".").replace(" ,", ",")
                fault = tales.check(text)
                assert fault is not None
                assert int(fault.split()[1].rstrip(":")) <= position + 1


def test_a_word_that_the_checker_refuses_is_one_whose_probability_is_zero(held_out):
    """Swap in a random word anywhere: accepted up to there exactly if the grammar gives it a chance."""
    rng = random.Random(5)
    vocabulary = sorted({word for story in held_out for word in words_of(story)})
    for story in held_out[:300]:
        words = words_of(story)
        position, word = rng.randrange(len(words)), rng.choice(vocabulary)
        possible = word in tales.next_word_probabilities(words[:position])
        fault = tales.check(" ".join([*words[:position], word]))
        assert fault.startswith(f"word {position + 1 + possible}:"), fault


def test_the_checker_never_raises_on_any_string():
    rng = random.Random(3)
    strange = ["\x00", "\ud800", "🦊", "é", "<|endoftext|>", "<|", "One", " ", "\n", "\u2028", "(", "\\", "Monday", "_"]
    for _ in range(2_000):
        assert isinstance(tales.check("".join(rng.choices(strange, k=rng.randrange(12)))), str)
    assert len(tales.check("x" * 1_000_000)) < 200


def test_a_prefix_that_begins_no_story_has_no_next_word():
    with pytest.raises(ValueError, match="word 2 is 'lake'"):
        tales.next_word_probabilities(["One", "lake"])


# --- the tokenizer ---------------------------------------------------------------------------------------


def test_every_story_comes_back_from_its_tokens_exactly(many_stories):
    tokenizer = TalesTokenizer()
    for story in many_stories:
        ids = tokenizer.encode(story)
        assert tokenizer.decode(ids) == story
    assert len(ids) == len(words_of(story))


def test_any_sequence_of_tokens_comes_back_from_its_text():
    tokenizer, rng = TalesTokenizer(), random.Random(4)
    assert tokenizer.decode(range(tokenizer.vocab_size)).count(" ") > 150
    for _ in range(1_000):
        ids = rng.choices(range(tokenizer.vocab_size), k=rng.randrange(20))
        ids.insert(rng.randrange(len(ids) + 1), tokenizer.end_of_text)
        assert tokenizer.encode(tokenizer.decode(ids)) == ids


def test_end_of_text_is_token_0_and_is_written_as_gpt_2_writes_it():
    tokenizer = TalesTokenizer()
    assert tokenizer.end_of_text == 0
    assert tokenizer.encode("<|endoftext|>") == [0]
    assert tokenizer.decode([0]) == "<|endoftext|>"
    assert tokenizer.decode([0, *tokenizer.encode(LOST), 0]) == f"<|endoftext|>{LOST}<|endoftext|>"


def test_an_unknown_word_is_named_with_the_most_similar_known_one():
    with pytest.raises(ValueError, match=r"'bakers'.*'baker'"):
        TalesTokenizer().encode("Anna and the bakers")


def test_a_token_id_out_of_range_is_refused():
    tokenizer = TalesTokenizer()
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token id {wrong} is out of range"):
            tokenizer.decode([0, wrong])
