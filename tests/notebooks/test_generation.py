"""notebooks/generation.ipynb runs whole, and what it prints is right: held against GPT-2 written out in numpy, float64.

`test_form.py` holds its form.
"""

import math
import re
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from GPT2Model.config import from_preset
from GPT2Model.generation import generate, make_cache
from GPT2Model.gpt2 import GPTModel
from orchestrator.learning.trained import tales_model
from orchestrator.text import tales
from tests.notebooks.exercise_code import run_exercises
from tests.notebooks.reading import numbers, pictures, printed

NOTEBOOK = "generation.ipynb"
EPS = np.finfo(np.float32).eps
OPENING = "One morning a kind girl named Ada and her friend the clown carried"


@pytest.fixture(scope="module")
def ours():
    return tales_model(progress=False)


@pytest.fixture(scope="module")
def tokenizer(ours):
    return ours[1]


@pytest.fixture(scope="module")
def read(ours):
    """read(ids, keep=None, places=None) -> (logits (T, V), [each block's keys and values (2, T, C)]), in float64.

    `keep` (T, T): who sees whom, causal if None. `places`: the positions, 0, 1, 2, ... if None.
    """
    W = {name: tensor.double().numpy() for name, tensor in ours[0].state_dict().items()}

    def norm(x, name):
        centred = x - x.mean(axis=-1, keepdims=True)
        return centred / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5) * W[f"{name}.weight"] + W[f"{name}.bias"]

    def linear(x, name):
        return x @ W[f"{name}.weight"].T + W[f"{name}.bias"]

    def forward(ids, keep=None, places=None):
        T = len(ids)
        keep = np.tri(T, dtype=bool) if keep is None else keep
        x = W["token_embedding.weight"][ids] + W["position_embedding.weight"][range(T) if places is None else places]
        kept = []
        for i in range(2):
            block = f"blocks.{i}"
            q, k, v = np.split(linear(norm(x, f"{block}.norm_1"), f"{block}.attention.W_qkv"), 3, axis=-1)
            kept.append(np.stack([k, v]))
            heads = []
            for h in range(4):
                part = slice(32 * h, 32 * h + 32)
                scores = np.where(keep, q[:, part] @ k[:, part].T / math.sqrt(32), -np.inf)
                weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
                heads.append(weights / weights.sum(axis=-1, keepdims=True) @ v[:, part])
            x = x + linear(np.concatenate(heads, axis=-1), f"{block}.attention.out_proj")
            hidden = linear(norm(x, f"{block}.norm_2"), f"{block}.feed_forward.up_proj")
            bent = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
            x = x + linear(bent, f"{block}.feed_forward.down_proj")
        return norm(x, "final_norm") @ W["token_embedding.weight"].T, kept

    return forward


@pytest.fixture(scope="module")
def greedy(read, tokenizer):
    """greedy(ids) -> the continuation up to the first end, by numpy, the whole text read for each word."""

    def write(ids, most=100):
        new = []
        while len(new) < most and (not new or new[-1] != tokenizer.end_of_text):
            new.append(int(read([*ids, *new])[0][-1].argmax()))
        return new

    return write


@pytest.fixture(scope="module")
def twenty(tokenizer):
    """The 21 tokens of section 4."""
    return [tokenizer.end_of_text, *tokenizer.encode(tales.stories(1, seed=5)[0])][:21]


def softmax(logits):
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_the_model_knows_the_chances_of_the_program(executed, read, tokenizer):
    width, words, context = 128, len(set(re.findall(r"\w+|[.,]", " ".join(tales.stories(3000, seed=9))))), 128
    parameters = (words + 1 + context) * width + 2 * (12 * width**2 + 13 * width) + 2 * width
    assert f"a model of {parameters:,} parameters, {words + 1} words, context {context}" in printed(executed, "END = ")
    text = printed(executed, "truth = tales.next_word")
    logits = read([tokenizer.end_of_text, *tokenizer.encode(OPENING)])[0][-1]
    chances, known = softmax(logits), 0.0
    for word, truth in (("a", 8 / 16), ("an", 2 / 16), ("some", 6 / 16)):
        number = tokenizer.encode(word)[0]
        logit, found, said = numbers(rf"(?m)^{word} +logit +NUMBER +model NUMBER +truth NUMBER", text)
        assert said == truth
        assert logit == pytest.approx(logits[number], abs=6e-3)
        assert found == pytest.approx(chances[number], abs=6e-5)
        assert found == pytest.approx(truth, abs=0.05)  # it has learned them
        known += chances[number]
    assert numbers("other words together: NUMBER", text)[0] == pytest.approx(1 - known, rel=0.1, abs=1e-5)


def test_temperature_raises_each_chance_to_a_power(executed):
    text = printed(executed, "(0.01, 100.0)")
    for temperature in (0.5, 1.0, 2.0, 0.01, 100.0):
        powers = (np.array([8, 2, 6]) / 8) ** (1 / temperature)
        row = numbers(rf"temperature {temperature}: .*chances NUMBER, NUMBER, NUMBER", text)
        np.testing.assert_allclose(row, powers / powers.sum(), atol=6e-5)
    for temperature, powers in ((0.5, (64, 4, 36)), (1.0, (8, 2, 6)), (2.0, np.sqrt([8, 2, 6]))):
        row = numbers(rf"temperature {temperature}: NUMBER : NUMBER : NUMBER,", text)
        np.testing.assert_allclose(row, powers, atol=6e-3)


def by_fractions(chances, top_k=None, top_p=None):
    """What top-k and then top-p leave of chances that fall: exact."""
    left = list(chances)[:top_k]
    left = [chance / sum(left) for chance in left]
    if top_p is not None:
        count = next(n for n in range(1, len(left) + 1) if sum(left[:n]) >= top_p)
        left = [chance / sum(left[:count]) for chance in left[:count]]
    return [float(chance) for chance in left] + [0.0] * (len(chances) - len(left))


def test_top_k_and_top_p_on_paper(executed, read, tokenizer):
    text = printed(executed, "def chances_left")
    chances = [Fraction(weight, 16) for weight in (8, 4, 2, 1, 1)]
    squares = [chance**2 / sum(c**2 for c in chances) for chance in chances]
    p = Fraction(8, 10)
    for call, left in (
        ("{'top_k': 2}", by_fractions(chances, 2)),
        ("{'top_p': 0.8}", by_fractions(chances, top_p=p)),
        ("{'top_k': 3, 'top_p': 0.8}", by_fractions(chances, 3, p)),
        ("{'temperature': 0.5, 'top_p': 0.8}", by_fractions(squares, top_p=p)),
    ):
        assert f"{call}: {[round(value, 4) for value in left]}\n" in text
    assert len(pictures(executed, "def chances_left")) == 1
    logits = read([tokenizer.end_of_text, *tokenizer.encode(OPENING)])[0][-1]
    assert np.sort(softmax(logits / 3))[:-3].sum() > 0.5  # "together they would get more than half of the chances"


def test_drawing_gives_each_word_its_chance(executed):
    text = printed(executed, "def race(")
    chances = np.array([8, 4, 2, 1, 1]) / 16
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0)).double().numpy()
    darts = np.histogram(u, bins=[0, *np.cumsum(chances)])[0] / 20_000
    deviation = np.sqrt(chances * (1 - chances) / 20_000)
    for way in ("dart", "race"):
        shares = numbers(rf"{way}: 20000 draws, shares \[{', '.join(['NUMBER'] * 5)}\]", text)
        assert (np.abs(shares - chances) <= 4 * deviation + 5e-5).all()
        assert way != "dart" or np.abs(shares - darts).max() <= 6e-5


def test_greedy_writes_one_story_and_chance_writes_others(executed, tokenizer, greedy):
    text = printed(executed, "by_chance = write")
    first, second = (one_line(paragraph) for paragraph in text.split("\n\n")[:2])
    assert first == tokenizer.decode(greedy([tokenizer.end_of_text])[:-1])
    assert tales.check(first) is None
    assert first != one_line(second)
    different, of, right = numbers("greedy: NUMBER different of NUMBER, NUMBER obey", text)
    assert (different, of, right) == (1, 5, 5)
    different, of, right = numbers("temperature 1: NUMBER different of NUMBER, NUMBER obey", text)
    assert (different, of) == (5, 5)
    assert right >= 3


def test_the_hotter_the_more_words_and_the_less_grammar(executed, tokenizer):
    text = printed(executed, "obeying, vocabulary")
    rows = [
        numbers(rf"(?m)^{re.escape(str(t))} +NUMBER of 40 +NUMBER +NUMBER$", text)
        for t in (0.02, 0.1, 0.5, 1.0, 1.25, 1.5, 2.0)
    ]
    obeying, words, lengths = np.array(rows).T
    assert (np.diff(obeying) <= 1).all()  # one story of 40 is chance
    assert obeying[0] >= 39
    assert obeying[-1] <= 4
    assert words[0] < 110 < words[3]
    assert words[-1] > words[3]
    assert words.max() <= tokenizer.vocab_size - 1
    assert lengths[2] == pytest.approx(tales.TOKENS_PER_STORY - 1, abs=1.5)  # the end is not counted
    assert numbers("at temperature 1.5 with top_p = 0.95: NUMBER of 40", text)[0] > obeying[5] + 5
    opening = re.search(r"at temperature 2: (.*) \.\.\.", text)[1]
    fault = re.search(r"the checker: word (\d+): found '(\w+)'", text)
    if int(fault[1]) <= len(opening.split()):  # no mark before it is sure: the sentence has none so early
        assert tales.check(opening).startswith(f"word {fault[1]}: found '{fault[2]}'")
    assert len(pictures(executed, "obeying, vocabulary")) == 1


def test_old_keys_and_values_never_change_under_the_mask_and_do_without_it(executed, read, twenty):
    text = printed(executed, "def keys_and_values")
    for causal in (True, False):
        before, after = (
            read(twenty[:n], np.tri(n, dtype=bool) if causal else np.ones((n, n), bool))[1] for n in (20, 21)
        )
        moved = [np.abs(old - new[:, :20]).max() for old, new in zip(before, after, strict=True)]
        first, second = numbers(f"causal={causal} +.*'block 0: NUMBER', 'block 1: NUMBER'", text)
        assert first <= 64 * EPS
        assert moved[0] < 1e-12
        if causal:
            assert moved[1] < 1e-12
            assert second <= 64 * EPS
        else:
            assert second == pytest.approx(moved[1], rel=0.03)


def test_the_cache_by_hand_gives_the_same_logits(executed, read, twenty):
    text = printed(executed, "def read(")
    apart, largest = numbers("logits at most NUMBER apart, the largest is NUMBER", text)
    assert 0 < apart < 8 * 32 * EPS
    assert largest == pytest.approx(np.abs(read(twenty[:20])[0]).max(), abs=6e-3)
    assert "keys of shape (1, 4, 20, 32)" in text


def test_several_new_tokens_need_the_mask_again(executed, read, twenty):
    text = printed(executed, "three_at_once")
    right = read(twenty[:20])[0][17:]
    sees_all = np.tri(20, dtype=bool)
    sees_all[17:] = True
    wrong = np.abs(read(twenty[:20], sees_all)[0][17:] - right).max(axis=-1)
    found = numbers(r"without a mask .*\['NUMBER', 'NUMBER', 'NUMBER'\]", text)
    np.testing.assert_allclose(found, wrong, rtol=0.06)
    assert wrong.min() > 1e-3  # all three
    assert max(numbers(r"lower right .*\['NUMBER', 'NUMBER', 'NUMBER'\]", text)) < 1e-4
    drawn = [line.split() for line in text.splitlines() if line and set(line) <= set("■· ")]
    np.testing.assert_array_equal(np.array(drawn) == "■", np.tri(3, 20, 17, dtype=bool))


def test_when_cached_is_not_the_same(executed, read, twenty):
    text = printed(executed, "leaky = GPTModel")
    apart, gap = numbers("rounding: logits NUMBER apart; .* at least NUMBER apart", text)
    best = np.sort(read(twenty[:20])[0], axis=-1)
    assert gap == pytest.approx((best[:, -1] - best[:, -2]).min(), rel=0.15)  # one digit was printed
    assert 0 < apart < gap / 10  # so the text is the same
    assert numbers("eval +cached and uncached: NUMBER apart", text)[0] < 1e-4
    assert numbers("train +cached and uncached: NUMBER apart", text)[0] > 0.1
    assert "generate() all the same: True - it goes into eval, and back to train: True" in text


def test_past_the_context_the_cache_is_worthless(executed, read, tokenizer):
    text = printed(executed, "with the stale cache")
    assert "ValueError: 129 tokens are more than context_length=128: pass the last 128 at most." in text
    end, ids = tokenizer.end_of_text, [tokenizer.end_of_text]
    for story in tales.stories(3, seed=7):
        ids += [*tokenizer.encode(story), end]
    ids = ids[:129]
    (_, before), (right, after) = read(ids[:128]), read(ids[1:])
    for i in range(2):
        moved, largest = numbers(f"blocks.{i}.attention.keys: .* move by NUMBER; the largest key is NUMBER", text)
        assert moved == pytest.approx(np.abs(before[i][0, 1:] - after[i][0, :-1]).max(), abs=6e-3)
        assert largest == pytest.approx(np.abs(after[i][0]).max(), abs=6e-3)
    keep = np.tri(129, dtype=bool)
    keep[128, 0] = False  # the cache has let the oldest go; what the others took from it is still in them
    stale = read(ids, keep, [*range(128), 127])[0][-1]
    assert numbers("logits are wrong by NUMBER", text)[0] == pytest.approx(np.abs(stale - right[-1]).max(), abs=6e-4)
    assert "a prompt of 120 tokens and 20 new ones are more than context_length=128" in one_line(text)
    assert "sliding from 120 to 140 tokens, cached and not, the same: True" in text


def test_a_batch_is_padded_on_the_left(executed, greedy, tokenizer):
    text = printed(executed, "is_real = ")
    lengths = []
    for prompt in ("One morning a", "One Friday a shy boy named Max and"):
        lengths.append(len(greedy([tokenizer.end_of_text, *tokenizer.encode(prompt)], 60)))
        assert re.search(f"'{prompt}': as alone True; .*; ends after {lengths[-1]} words", text)
    assert "'One morning a': as alone True; without the mask False" in text
    assert f"row {np.argmin(lengths)} ended first; behind its end stands {2 * tales.END_OF_TEXT!r}" in text
    assert "pad prompts on the left" in text
    assert f"positions: {[[0] * 5 + [0, 1, 2, 3], list(range(9))]}" in text


def test_the_arithmetic_that_the_cache_saves_is_what_torch_counts(executed):
    text = printed(executed, "one_token = ")
    torch.manual_seed(0)
    model = GPTModel(from_preset("nano", vocab_size=177, emb_dim=256, n_layers=4, drop_rate=0.0)).eval()
    model.set_attention("eager")  # matrix products, which torch counts on any device
    ids = torch.zeros(1, 128, dtype=torch.long)

    def counted(tokens: int, past: int) -> int:
        cache = make_cache(model, 1, past + tokens)
        with torch.no_grad():
            if past:
                model(ids[:, :past], cache=cache)
            with FlopCounterMode(display=False) as counter:
                model(ids[:, :tokens], cache=cache)
        return counter.get_total_flops()

    first, slope = counted(1, past=0), counted(1, past=1) - counted(1, past=0)  # one key more for each token

    def one(t: int) -> int:
        return first + (t - 1) * slope

    assert (counted(1, past=127), counted(100, past=0)) == (one(128), 100 * one(100))  # so they need not all be run
    for words in (16, 32, 64, 128):
        cached = sum(one(t) for t in range(1, words))
        uncached = sum(t * one(t) for t in range(1, words))
        (said,) = numbers(f"{words} words: .*; +NUMBER times the arithmetic", text)
        assert said == pytest.approx(uncached / cached, abs=0.06)
    assert len(re.findall(r"without cache +\d+\.\d times as long", text)) == 4
    assert len(pictures(executed, "one_token = ")) == 1


def test_the_cache_in_bytes_and_one_seed_one_text(executed):
    text = printed(executed, "def cache_bytes").replace(",", "")
    by_formula, measured = numbers("3 x 128 tokens: NUMBER bytes by formula NUMBER measured", text)
    assert (
        by_formula == 3 * 128 * 2 * 2 * (4 * 32) * 4
    )  # sequences, tokens, keys and values, blocks, heads of 32, bytes
    assert by_formula <= measured <= by_formula + 2**16
    for preset, parameters, blocks, width in (("gpt2", 124_439_808, 12, 768), ("gpt2-xl", 1_557_611_200, 48, 1600)):
        weights, held = numbers(rf"(?m)^{preset} +weights NUMBER MB cache of 1024 tokens NUMBER MB", text)
        assert weights == round(4 * parameters / 1e6)
        assert held == round(2 * blocks * 1024 * width * 4 / 1e6, 1)
    assert "same seed same stories: True - without the cache: True - another seed: False" in text
    assert "torch's own random state is untouched: True" in text


PROMPTS = (
    "One morning a kind girl named Ada and",
    "One Friday a shy boy named Max",
    "One Tuesday a brave boy named Adam and his",
)
STEP = re.compile(r"^step +(\d+) \| +(\d+) free \|(.*)$", re.MULTILINE)


def steps(text: str) -> list[tuple[int, dict[str, tuple[list[int], int]], list[str]]]:
    """(free blocks, {text: (its blocks, its tokens)}, those that wait) of every step that was printed, in order."""
    found = []
    for number, (step, free, rest) in enumerate(STEP.findall(text), start=1):
        tables = {
            name: ([int(block) for block in blocks.split(",")], int(tokens))
            for name, blocks, tokens in re.findall(r"(text \w+): \[([\d, ]+)\] (\d+)", rest)
        }
        assert int(step) == number
        found.append((int(free), tables, re.findall(r"(text \d+) waits", rest)))
    return found


def test_pages_waste_half_a_block_where_rows_waste_most(executed):
    text = printed(executed, "set_aside = ").replace(",", "")
    u = torch.rand(32, 2, generator=torch.Generator().manual_seed(0)).double().numpy()
    lengths = np.rint(16 * 16**u).sum(axis=1).astype(int)
    assert f"32 texts of {lengths.min()} to {lengths.max()} tokens {lengths.sum()} in all" in text
    for size in (1024, 256, 64, 16, 4, 1):
        blocks = sum((length + size - 1) // size for length in lengths)
        slots, bytes_, filled, empty = numbers(
            rf"blocks of +{size}: +NUMBER slots +NUMBER MB +NUMBER% filled; +NUMBER empty", text
        )
        assert slots == blocks * size
        assert bytes_ == pytest.approx(slots * 12 * 2 * 768 * 4 / 1e6, abs=0.51)
        assert filled == pytest.approx(100 * lengths.sum() / slots, abs=0.51)
        assert empty == pytest.approx((slots - lengths.sum()) / 32, abs=0.051)
    assert 5.5 < 32 * 1024 / lengths.sum() < 6.5  # "a sixth", and ...
    assert round(32 * 1024 / sum(-(-lengths // 16) * 16)) == 6  # ... "six times as many texts"


def test_attention_by_hand_over_scattered_blocks(executed, read, tokenizer):
    text = printed(executed, "key_pool, value_pool")
    table = [7, 2, 9, 4, 0, 5]
    for t in (0, 6, 20):
        entry, slot = divmod(t, 4)
        assert f"token {t:>2}: entry {entry} of the table, so block {table[entry]}, slot {slot}" in text
    by_hand, paged = numbers("by hand and in one piece: NUMBER apart; paged_attention and in one piece: NUMBER", text)
    assert max(by_hand, paged) <= 16 * EPS
    assert "slots with somebody's keys: 21 of 40" in text
    ids = [tokenizer.end_of_text, *tokenizer.encode(tales.stories(1, seed=5)[0])][:21]
    assert np.abs(read(ids)[1][1][1]).max() < 4  # what the tolerance takes the values to be


def check_tables(shown, blocks: int, shared: bool = False) -> None:
    """Every table is as long as its text asks for, nobody's block is another's, and what is free is counted."""
    for free, tables, _ in shown:
        held = [block for table, _ in tables.values() for block in table]
        assert shared or len(set(held)) == len(held)
        assert free == blocks - len(set(held))
        assert all(len(table) == -(-tokens // 4) for table, tokens in tables.values())


def test_the_engine_at_work_step_by_step(executed, greedy, tokenizer):
    prompts = [[tokenizer.end_of_text, *tokenizer.encode(text)] for text in PROMPTS]
    assert [len(ids) for ids in prompts] == [9, 8, 10]  # the prose
    written = [greedy(ids, count) for ids, count in zip(prompts, (8, 14, 10), strict=True)]
    text = printed(executed, "def step_and_show")
    for i, ids in enumerate(written):
        assert f"text {i}, as alone: {tokenizer.decode(ids)!r}" in text
    shown = steps(text)
    check_tables(shown, 10)
    first, second, third = ([step for step, (_, tables, _) in enumerate(shown, start=1) if f"text {i}" in tables]
                            for i in range(3))  # fmt: skip
    assert first == [*range(1, 8)]  # done in step 8: the text's last word is never read
    assert second == [*range(1, 14)]
    assert third == [*range(9, 18)]  # a step after the first has ended, as the prose says
    assert [step for step, (*_, waiting) in enumerate(shown, start=1) if waiting] == [4, 5, 6, 7, 8]
    for i, here in enumerate((first, second, third)):
        assert [shown[step - 1][1][f"text {i}"][1] for step in here] == [len(prompts[i]) + n for n in range(len(here))]
    assert set(shown[8][1]["text 2"][0]) & set(shown[6][1]["text 0"][0])  # a block that came back
    assert len(pictures(executed, "def step_and_show")) == 2


def test_the_pages_by_hand_take_a_block_of_their_own_each_time(executed, tokenizer):
    text = printed(executed, "read_so_far[i] = ")
    lengths = [1 + len(tokenizer.encode(prompt)) for prompt in PROMPTS]
    tables, given = [[], [], []], 0
    for step in range(14):
        for i, count in enumerate((8, 14, 10)):
            while step < count and len(tables[i]) * 4 < lengths[i] + step:
                tables[i].append(given)
                given += 1
    assert given == 15  # the prose
    assert f"block tables at the end: {tables} - free blocks: 0" in text


def test_a_common_beginning_is_read_and_held_once(executed, read, greedy, tokenizer):
    text = printed(executed, "def shared_by_hand")
    end = tokenizer.end_of_text
    asked = [[end, *tokenizer.encode(f"{OPENING} {rest}")] for rest in ("a red drum to", "an orange bell to")]
    other = [end, *tokenizer.encode("One Friday a"), *asked[0][4:]]
    assert [len(ids) for ids in (*asked, other)] == [18, 18, 18]
    assert [a == b for a, b in zip(*asked, strict=True)].index(False) == 14

    beginnings = [{tuple(ids[:stop]) for stop in (4, 8, 12, 16, 18)} for ids in asked]  # what each block is the end of
    found = 4 * len(beginnings[0] & beginnings[1])
    for sharing, here in ((False, 0), (True, found)):
        said = numbers(f"sharing {sharing}: NUMBER tokens read, NUMBER found, NUMBER blocks held", text)
        assert said == [36 - here, here, 10 - here // 4]
    assert len(beginnings[0] | beginnings[1]) == 7  # the prose: seven blocks
    whole = [ids + greedy(ids, 6)[:-1] for ids in asked]  # the last word is never read
    full = {tuple(ids[:stop]) for ids in whole for stop in range(4, len(ids) + 1, 4)}
    assert f"both are done: 0 blocks held, {len(full)} can still be found" in text
    assert "the first prompt again: 16 of 18 tokens found" in text
    assert "another first sentence: 0 of 18 tokens found" in text

    one, two = read(asked[0])[1], read(other)[1]  # the same words at places 4 to 13 ...
    assert np.abs(one[0][:, 4:14] - two[0][:, 4:14]).max() < 1e-9  # ... have the same keys in the first layer ...
    assert np.abs(one[1][:, 4:14] - two[1][:, 4:14]).max(axis=(0, 2)).min() > 1e-3  # ... and others above it


def test_samples_of_one_prompt_copy_the_block_that_they_write_into(executed, read, tokenizer):
    text = printed(executed, "last_keys = ")
    prompt = [tokenizer.end_of_text, *tokenizer.encode(OPENING)]
    assert len(prompt) == 14
    written = []
    for i in range(3):  # each draws from its own seed, from the chances that numpy gives
        generator, ids = torch.Generator().manual_seed(i), list(prompt)
        for _ in range(8):
            chances = torch.tensor(softmax(read(ids)[0][-1]), dtype=torch.float32)
            ids.append(int(torch.multinomial(chances, 1, generator=generator)))
        written.append(ids[14:])
        assert f"sample {i}, as alone with seed {i}: {tokenizer.decode(ids[14:])!r}" in text

    first, second = steps(text)
    check_tables((first, second), 12, shared=True)
    assert [table for table, _ in first[1].values()] == [[0, 1, 2, 3]] * 3
    assert "how many hold each block: {0: 3, 1: 3, 2: 3, 3: 3}" in text
    assert [table[:3] for table, _ in second[1].values()] == [[0, 1, 2]] * 3
    last = [table[3] for table, _ in second[1].values()]
    assert len(set(last)) == 3
    assert last[2] == 3  # the last of them keeps the old block
    for slot, same in enumerate((["True"] * 2, ["True"] * 2, ["False"] * 2)):
        assert re.search(rf"slot {slot} of their last blocks: .* equal to those of a: \[{', '.join(same)}\]", text)
    words = [tokenizer.decode(ids[:1]) for ids in written]
    assert f"slot 2 of their last blocks: {words}" in text
    assert words[0] not in words[1:]
    assert "copies: 2 - prompt tokens read: 14" in text
    assert len(pictures(executed, "last_keys = ")) == 2


def test_who_came_last_gives_way_and_no_text_changes(executed, greedy, tokenizer):
    text = printed(executed, "lost, history, held")
    prompts = [[tokenizer.end_of_text, *tokenizer.encode(prompt)] for prompt in PROMPTS]
    needed = -(-(len(prompts[0]) + 40 - 1) // 4)
    assert f"{len(prompts[0])} tokens of prompt and 40 new ones need {needed} blocks of 4 tokens" in text
    assert sum(-(-(len(ids) + 14 - 1) // 4) for ids in prompts) == 18  # "together they need 18 blocks"
    assert all(len(greedy(ids, 14)) == 14 for ids in prompts)  # none ends by itself: so the steps can be counted

    shown = steps(text)
    check_tables(shown, 10)
    lost, sent_back = 0, []
    for step, ((_, before, _), (_, after, waiting)) in enumerate(pairwise(shown), start=2):
        for name in set(before) & set(waiting):
            lost += before[name][1]
            sent_back.append((name, step))
            assert name == max(before)  # who came last
        assert not set(after) & set(waiting)
    assert sent_back == [("text 2", 5), ("text 1", 13)]  # the prose
    said = numbers("NUMBER preemptions, NUMBER tokens lost: NUMBER read again, NUMBER found", text)
    assert said[:2] == [2, lost]
    assert said[2] + said[3] == lost
    assert [tables["text 0"][1] for _, tables, _ in shown[:13]] == [len(prompts[0]) + n for n in range(13)]  # gets on
    assert max(len(tables) for _, tables, _ in shown) * 128 == 384  # "up to 384 slots"
    assert len(pictures(executed, "lost, history, held")) == 1


def test_the_exercises_run(committed, ours, tokenizer):
    needs = ("%matplotlib inline", "truth = tales", "def chances_left", "by_chance = write", "def keys_and_values",
             "def read(")  # fmt: skip
    text = run_exercises(committed, needs)
    lines = text.splitlines()
    assert lines[0] == "tensor(5) tensor(4)"  # 0.5 + 0.25 + 0.125 < 0.9: the fourth is needed too
    assert "the same story: False" in lines
    start = torch.full((3, 1), tokenizer.end_of_text)
    many = generate(ours[0], start, 30, 1.0, seed=2)
    assert torch.equal(many[2], generate(ours[0], start[:1], 30, 1.0, seed=4)[0])  # the solution: 2 + 2
    moved, same = numbers("logits move by NUMBER; NUMBER of 20", text)
    assert 1e-6 < moved < 0.1
    assert same >= 18
    assert lines[-1] == f"{[6, 7, 8, 9]} {[2 * 4 + 2, 2 * 4 + 3, 9 * 4, 9 * 4 + 1]}"
