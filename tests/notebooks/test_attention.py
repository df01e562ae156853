"""notebooks/attention.ipynb runs whole, and what it prints is right: held against numbers computed here, another way.

`test_form.py` holds its form.
"""

import ast
import math
import re
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
import transformers

from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from orchestrator.evaluation.cases import Case, tensors
from orchestrator.text import tales
from tests.notebooks.conftest import FOLDER
from tests.notebooks.exercise_code import run_exercises
from tests.notebooks.reading import numbers, pictures, printed

NOTEBOOK = "attention.ipynb"
EPS = np.finfo(np.float32).eps
NAMES = ("eager", "sdpa", "flash_tiled")


def attend(q, k, v, keep, scale=None):
    """The definition in numpy, float64: (..., T, D); `keep` (queries, keys)."""
    scores = q @ np.swapaxes(k, -1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = np.where(keep, scores, -np.inf)
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True) @ v


def normal(*shape) -> np.ndarray:
    """What torch.randn gives after torch.manual_seed(0), as float64."""
    torch.manual_seed(0)
    return torch.randn(*shape).double().numpy()


def drawn_mask(text: str) -> np.ndarray:
    """The table that AttentionMask.show() printed."""
    rows = [line.split() for line in text.splitlines() if line and set(line) <= set("■· ")]
    return np.array([[character == "■" for character in row] for row in rows])


def test_attention_knows_no_order_but_the_masks(executed):
    text = printed(executed, "def attend(")
    q, k, v = normal(3, 1, 2, 6, 8)
    order = [3, 0, 5, 1, 4, 2]
    moved = {}
    for what, keep in (("no mask", np.ones((6, 6), bool)), ("causal", np.tri(6, dtype=bool))):
        shuffled = attend(q, k[:, :, order], v[:, :, order], keep)
        moved[what] = np.abs(shuffled - attend(q, k, v, keep)).max()
    assert numbers("no mask .* moves by NUMBER", text)[0] <= 8 * 3 * EPS
    assert moved["no mask"] < 1e-14
    assert numbers("causal .* moves by NUMBER", text)[0] == pytest.approx(moved["causal"], rel=0.03)


def test_nothing_before_a_changed_token_moves(executed):
    text = printed(executed, "causality_map(moved")
    q, k, v = normal(3, 12, 8)
    keep, moved = np.tri(12, dtype=bool), np.zeros((12, 12))
    for t in range(12):
        changed = np.eye(12)[t][:, None]
        moved[:, t] = np.abs(attend(q, k + changed, v + changed, keep) - attend(q, k, v, keep)).max(axis=-1)
    assert np.triu(moved, 1).max() == 0
    for name in NAMES:
        above, below = numbers(rf"{name} +before the changed token: NUMBER at most; .*: NUMBER at least", text)
        assert above == 0
        assert below == pytest.approx(moved[keep].min(), rel=0.15)  # one digit was printed
    assert len(pictures(executed, "causality_map(moved")) == 1


def test_zero_times_nan_is_nan(executed):
    text = printed(executed, "nan_value[")
    q, k, v = normal(3, 12, 8)
    k[-1], bad = np.nan, v.copy()
    bad[-1] = np.nan
    with np.errstate(invalid="ignore"):
        in_key, in_value = (
            int(np.isnan(attend(q, keys, values, np.tri(12, dtype=bool))).any(axis=1).sum())
            for keys, values in ((k, v), (normal(3, 12, 8)[1], bad))
        )
    assert (in_key, in_value) == (1, 12)
    assert numbers("eager +NaN in the last key: +NUMBER of 12 rows; in the last value: +NUMBER of 12", text) == [1, 12]
    assert numbers("flash_tiled +NaN in the last key: +NUMBER of 12 rows; in the last value: +NUMBER", text) == [1, 4]
    assert "0 * NaN = nan" in text


def test_rows_that_see_nothing(executed):
    text = printed(executed, 'words = ["<pad>"')
    table = np.tri(6, dtype=bool) & np.array([False, False, True, True, True, True])
    np.testing.assert_array_equal(drawn_mask(text), table)
    assert f"rows that see nothing: {np.flatnonzero(~table.any(axis=1)).tolist()}" in text
    assert f"row of -inf: {[math.nan] * 6}" in text
    assert f"row of the lowest number: {[round(1 / 6, 3)] * 6}" in text
    assert text.count("padded rows exactly 0: True") == 3
    assert len(pictures(executed, 'words = ["<pad>"')) == 1


def test_torch_s_layer_hides_where_its_function_shows(executed):
    text = printed(executed, "torch.nn.MultiheadAttention(8")
    torch.manual_seed(0)
    x = torch.randn(1, 6, 8)
    layer = torch.nn.MultiheadAttention(8, num_heads=2, bias=False, batch_first=True)
    weights = [tensor.detach().double().numpy() for tensor in (layer.in_proj_weight, layer.out_proj.weight)]
    parts = np.split(x[0].double().numpy() @ weights[0].T, 3, axis=-1)
    q, k, v = (part.reshape(6, 2, 4).swapaxes(0, 1) for part in parts)  # (H, T, D)
    real, triangle = np.arange(6) < 4, np.tri(6, dtype=bool)
    with np.errstate(invalid="ignore"):  # the last rows of the turned mask see nothing
        right, turned = (
            attend(q, k, v, keep & real).swapaxes(0, 1).reshape(6, 8) @ weights[1].T for keep in (triangle, ~triangle)
        )
    assert numbers("key_padding_mask=~is_real: NUMBER apart", text)[0] <= 8 * EPS
    for row, apart in enumerate(np.abs(turned - right).max(axis=-1)):
        if np.isnan(apart):
            assert f"as it stands: row {row} is nan apart" in text
        else:
            assert numbers(f"as it stands: row {row} is NUMBER apart", text)[0] == pytest.approx(apart, abs=6e-3)
    assert text.count("nan") == 3  # "rows for which no real token lies there"


def test_documents_and_a_window(executed):
    text = printed(executed, "same_text = ")
    documents, window = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2], 3
    pairs = {"causal": set(), "and documents": set(), "and window": set()}
    for query in range(10):
        for key in range(query + 1):
            pairs["causal"].add((query, key))
            if documents[query] == documents[key]:
                pairs["and documents"].add((query, key))
                if query - key < window:
                    pairs["and window"].add((query, key))
    for what, seen in pairs.items():
        assert numbers(f"{what} +NUMBER pairs", text) == [len(seen)]
    assert {tuple(map(int, pair)) for pair in np.argwhere(drawn_mask(text))} == pairs["and window"]
    assert len(pictures(executed, "same_text = ")) == 1


def test_the_triangle_belongs_in_the_lower_right_corner(executed):
    text = printed(executed, "lower_right = ")
    assert "the context is the value of key 0: True" in text
    np.testing.assert_array_equal(drawn_mask(text), np.tri(2, 6, 6 - 2, dtype=bool))
    assert numbers("at once: NUMBER apart", text)[0] <= 16 * EPS


def test_the_online_softmax_gives_the_numbers_on_paper(executed):
    text = printed(executed, "steps.append")
    scores, values = (0, 1, 2, 0), (8, 4, 2, 16)  # scores in units of ln 2: exp(score) is a power of 2
    running_sum = accumulated = Fraction(0)
    for number, tile in enumerate(((0, 1), (2, 3))):
        seen = max(scores[: tile[-1] + 1])
        correction = Fraction(0) if number == 0 else Fraction(2) ** (max(scores[:2]) - seen)
        running_sum = running_sum * correction + sum(Fraction(2) ** (scores[i] - seen) for i in tile)
        accumulated = accumulated * correction + sum(Fraction(2) ** (scores[i] - seen) * values[i] for i in tile)
        row = [float(value) for value in (seen, correction, running_sum, accumulated)]
        assert numbers(rf"(?m)^{number} +NUMBER +NUMBER +NUMBER +NUMBER", text) == row
    assert accumulated / running_sum == 5
    assert numbers("O / l = NUMBER; log-sum-exp m .* = NUMBER", text) == [5.0, round(math.log(8), 4)]


def test_tiles_may_be_merged_in_any_order_and_without_m_all_is_lost(executed):
    text = printed(executed, "def merge(")
    torch.manual_seed(0)
    scores, values = (100 + 5 * torch.randn(12)).double().numpy(), torch.randn(12).double().numpy()
    weights = np.exp(scores - scores.max())
    right, log_sum_exp = weights @ values / weights.sum(), scores.max() + math.log(weights.sum())
    for order in ("forwards", "backwards", "in pairs"):
        found, lse = numbers(f"{order} +O / l = NUMBER, log-sum-exp NUMBER", text)
        assert found == pytest.approx(right, abs=2e-6)
        assert lse == pytest.approx(log_sum_exp, abs=1e-4)
    assert "= inf; without m: nan" in text
    assert numbers("exact: NUMBER;", text)[0] == pytest.approx(right, abs=1e-6)
    limit = np.log(np.finfo(np.float32).max)
    assert numbers("can hold: NUMBER", text)[0] == pytest.approx(limit, abs=0.06)


def test_a_causal_pass_looks_at_the_tiles_on_and_below_the_diagonal(executed):
    text = printed(executed, "def flash(")
    for T, size in ((12, 4), (1024, 128)):
        tiles = np.tri(T).reshape(T // size, size, T // size, size).any(axis=(1, 3))
        assert numbers(rf"T = {T}.*: NUMBER of NUMBER tiles", text) == [tiles.sum(), tiles.size]


def test_the_traced_tiles_are_those_of_transformers_queries_and_keys(executed, tmp_path):
    text = printed(executed, "flash_tiles(traced")
    torch.manual_seed(0)
    words = tales.TalesTokenizer()
    model = GPTModel(from_preset("nano", vocab_size=words.vocab_size, drop_rate=0.0, init_std=0.2)).eval()
    ids = torch.tensor([words.encode("One Sunday a shy girl named Zoe and her friend the pilot")])
    assert "layer 1, head 0, token 11, 'pilot':" in text  # a word, and not its id
    model.save_pretrained(tmp_path)
    oracle = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval().double()
    seen = []
    hook = oracle.transformer.h[1].attn.c_attn.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    with torch.no_grad():
        oracle(ids)
    hook.remove()
    queries, keys, values = (part.numpy()[:, :32] for part in seen[0].split(128, dim=-1))  # head 0: 32 wide

    scores = queries[11] @ keys.T / math.sqrt(32)
    assert "6 tiles: [0:4,0:4], [4:8,0:4], [4:8,4:8], [8:12,0:4], [8:12,4:8], [8:12,8:12]" in text
    sums = []
    for end in (4, 8, 12):  # the running quantities after a tile are those of all keys so far
        m = scores[:end].max()
        weights = np.exp(scores[:end] - m)
        expected = [m, weights.sum(), *(weights @ values[:end] / weights.sum())[:3]]
        row = rf"\[8:12,{end - 4}:{end}\] +NUMBER +NUMBER +\+?NUMBER, \+?NUMBER, \+?NUMBER"
        np.testing.assert_allclose(numbers(row, text), expected, atol=2e-4)
        sums.append((m, weights.sum()))
    assert sums[1][0] > sums[0][0]
    assert sums[1][1] < sums[0][1]  # "the sum can fall, as it does here in the second tile"
    assert sums[2][0] == sums[1][0]  # "in the third the maximum stays"
    np.testing.assert_allclose(
        numbers(r"the context.*: +\+?NUMBER, \+?NUMBER, \+?NUMBER", text), expected[2:], atol=2e-4
    )
    assert len(pictures(executed, "flash_tiles(traced")) == 1


def test_the_gradients_are_those_of_finite_differences(executed):
    text = printed(executed, "grad_scores = ")
    torch.manual_seed(0)
    inputs = dict(zip("qkv", torch.randn(3, 12, 8).double().numpy(), strict=True))
    grad_o, keep = torch.randn(12, 8).double().numpy(), np.tri(12, dtype=bool)
    for name, tensor in inputs.items():
        slopes = np.zeros_like(tensor)
        for place in np.ndindex(tensor.shape):
            step = np.zeros_like(tensor)
            step[place] = 1e-5
            up, down = (attend(**{**inputs, name: tensor + sign * step}, keep=keep) for sign in (1, -1))
            slopes[place] = ((up - down) * grad_o).sum() / 2e-5
        largest, by_hand, tiled = numbers(
            f"gradient of {name}: largest NUMBER; by hand NUMBER from float64, flash_tiled NUMBER", text
        )
        assert largest == pytest.approx(np.abs(slopes).max(), abs=1e-4)
        assert max(by_hand, tiled) < 8 * 8 * EPS
    assert numbers("from the table: NUMBER apart", text)[0] < 1e-5


def test_what_is_kept_for_the_backward_pass(executed):
    text = printed(executed, "saved_tensors_hooks").replace(",", "")
    kept = {name: numbers(rf"{name} +T = 64: +NUMBER +T = 256: +NUMBER", text) for name in NAMES}
    assert kept["flash_tiled"] == [4 * T * 32 + T for T in (64, 256)]
    assert kept["sdpa"][1] < 256 * 256
    assert all(count >= T * T + 3 * T * 32 for count, T in zip(kept["eager"], (64, 256), strict=True))
    for name, (short, long) in kept.items():
        assert numbers(rf"{name} .* NUMBER times as many", text)[0] == pytest.approx(long / short, abs=0.06)


def test_rounding_is_within_the_bound_and_mistakes_are_far_above_it(executed):
    text = printed(executed, "mistakes = {").replace(",", "")
    assert "(a + b) + c = 1 a + (b + c) = 0" in text
    assert (np.float32(1e8) + np.float32(-1e8)) + np.float32(1) == 1
    assert np.float32(1e8) + (np.float32(-1e8) + np.float32(1)) == 0

    (q, k, v), _, _ = tensors(Case(query_len=128, key_len=128, num_heads=4, num_kv_heads=4, head_dim=64))
    q, k, v = (tensor.detach().numpy() for tensor in (q, k, v))
    wide, keep = [tensor.astype(np.float64) for tensor in (q, k, v)], np.tri(128, dtype=bool)
    right = attend(*wide, keep)
    bound = 2 * np.abs(attend(q, k, v, keep) - right).max() + 4 * EPS * max(1, np.abs(v).max())
    wrong = {
        "mask shifted by one": attend(*wide, np.tri(128, k=1, dtype=bool)),
        "scale forgotten": attend(*wide, keep, scale=1),
    }
    for name, context in wrong.items():
        ratio = np.abs(context - right).max() / bound
        assert numbers(f"{name} +error / bound = NUMBER", text)[0] == pytest.approx(ratio, rel=0.3)
    for name in NAMES:
        assert 0 < numbers(f"{name} +error / bound = NUMBER", text)[0] <= 1
    assert (
        numbers("softmax in bfloat16 +error / bound = NUMBER", text)[0] > 300
    )  # eps of bfloat16: 65536 times as large
    assert len(pictures(executed, "mistakes = {")) == 1


def test_all_implementations_meet_their_bounds_and_agree_in_a_whole_model(executed):
    text = printed(executed, "toggle_table(")
    for name in NAMES:
        ratios = numbers(rf"(?m)^{name} +NUMBER +NUMBER +NUMBER +NUMBER +NUMBER$", text)[:4]
        assert 0 < max(ratios) <= 1
    for name in NAMES[1:]:
        logits, gradients = numbers(f"whole model, {name} and eager: logits NUMBER apart, gradients NUMBER", text)
        assert 0 < logits < 2e-5
        assert 0 < gradients < 2e-5
    assert len(pictures(executed, "toggle_table(")) == 1


def test_the_weights_are_there_for_who_asks_and_dropout_drops_others(executed):
    text = printed(executed, "identity = torch.eye")
    assert "KeyError: blocks.0.attention.weights does not exist" in text
    assert "recomputed: True" in text
    rows = {
        name: re.search(rf"(?m)^{name} +last row's weights that stayed: ([x. ]+)$", text)[1].split()
        for name in ("eager", "sdpa", "flash_tiled, tiles of 2", "flash_tiled, tiles of 8")
    }
    assert rows["flash_tiled, tiles of 2"] == rows["flash_tiled, tiles of 8"] != rows["eager"]
    assert all(len(row) == 8 and 0 < row.count("x") < 8 for row in rows.values())  # a rate of 0.5
    assert "flash_tiled: the same for any tiles: True" in text
    assert "flash_tiled and eager the same:      False" in text
    assert rows["sdpa"] == rows["eager"]  # "sdpa on a CPU drops the same weights as eager"


def test_which_calls_make_a_table(executed):
    text = printed(executed, "class TableSpy")
    count = {
        (name, what): numbers(rf"{name} +{what} +NUMBER tables, NUMBER of them for each head", text)
        for name in NAMES
        for what in ("causal", "padding", "dropout")
    }
    for what in ("causal", "padding", "dropout"):
        assert count["flash_tiled", what] == [0, 0]
        assert count["eager", what][1] >= 3  # scores, masked scores, weights
    assert count["sdpa", "causal"] == [0, 0]
    assert count["sdpa", "padding"][0] > 0 == count["sdpa", "padding"][1]  # the mask's, and none of weights
    assert count["sdpa", "dropout"][1] >= 2
    assert "softmax" in re.search("(?m)^sdpa +dropout .*$", text)[0]
    assert "softmax" not in re.search("(?m)^sdpa +padding .*$", text)[0]


def test_memory_grows_with_t_squared_in_eager_only(executed):
    text = printed(executed, "run_bench(bench)").replace(",", "")
    for T in (64, 128, 256, 512, 1024):
        table, eager, sdpa, tiled = numbers(rf"(?m)^ +{T} +NUMBER +NUMBER +NUMBER +NUMBER$", text)
        assert table == 4 * T * T * 4 / 1024
        assert 2 <= eager / table <= 4
        assert sdpa >= 4 * T * 64 * 4 / 1024  # the context, at least
        assert T < 512 or sdpa < table
        assert 4 * T * 64 * 4 / 1024 <= tiled < 4 * T * 64 * 4 / 1024 + 4 * 4 * 128 * 128 * 4 / 1024 + 1024
    steps = ((256, 512), (512, 1024))  # what was asked, first
    for part, (short, long) in zip(text.split("from ")[1:], steps, strict=True):
        assert part.startswith(f"{short} to {long} tokens")
        before, after = (numbers(rf"(?m)^ +{T} +NUMBER +NUMBER +NUMBER +NUMBER$", text)[1:] for T in (short, long))
        for name, one, two in zip(NAMES, before, after, strict=True):
            factor, time = numbers(rf"{name} +memory x NUMBER time x NUMBER", part)
            assert factor == pytest.approx(two / one, rel=0.02)  # KiB are printed whole
            assert time > 1
            assert factor == pytest.approx(4, rel=0.04) if name == "eager" else factor < 3
    assert len(pictures(executed, "run_bench(bench)")) == 2


def test_how_one_is_chosen(executed):
    text = printed(executed, "auto, Mac (MPS)")
    expected = {
        "auto, CPU": ("sdpa", {}),
        "auto, CPU, weights wanted": ("eager", {"sdpa": ["weights_wanted"]}),
        "use_flash=False, CPU": ("eager", {}),
        "auto, Mac (MPS)": ("eager", {"sdpa": ["mps_nan"]}),
        "auto, Mac, disable_mps_fix": ("sdpa", {}),
    }
    for what, (chosen, rejected) in expected.items():
        found = re.search(rf"(?m)^{re.escape(what)} +-> (\w+) +rejected: (.*)$", text)
        assert (found[1], ast.literal_eval(found[2])) == (chosen, rejected)
    assert re.search(r"flash_attention_2, CPU +-> sdpa .*'cuda_only'", text)
    assert "left-padded batches" in text.split("the Mac's report says:")[1].splitlines()[0]
    assert "attn_strict=True: ValueError: flash_attention_2 cannot serve this request" in text
    assert re.search(r"(?m)^sdpa +training: sdpa +generation: sdpa$", text)


def test_what_takes_half_a_minute_is_left_out_unless_it_is_asked_for(executed):
    assert printed(executed, "TRY_FLEX = False").endswith("\nflex_attention left out: set TRY_FLEX = True\n")


def test_the_kernels_serve_from_section_10_on_and_meet_the_bound(executed):
    assert re.search(r"(?m)^flash_triton +training: sdpa +generation: sdpa$", printed(executed, "auto, Mac (MPS)"))
    text = printed(executed, "KERNELS = not reasons")
    assert "new_max = tl.maximum(running_max, tl.max(scores, 1))" in text.split("TRITON_INTERPRET=None")[0]
    remedy = r"\n    what to do: .*TRITON_INTERPRET=1 before Python starts"
    assert re.search(r"TRITON_INTERPRET=None: it runs on CUDA; .*" + remedy, text)
    assert "TRITON_INTERPRET=1: flash_triton can serve\n" in text
    ratios = {}
    for name in ("flash_tiled", "flash_triton"):
        ratios[name] = numbers(f"{name} +error / bound: context NUMBER, dQ NUMBER, dK NUMBER, dV NUMBER", text)
        assert 0 < max(ratios[name]) <= 0.5
    assert max(ratios["flash_triton"]) < 3 * max(ratios["flash_tiled"])  # "as near as flash_tiled"


def test_the_kernels_drop_what_the_formula_drops_whatever_their_tiles(executed):
    text = printed(executed, "KERNELS = not reasons")
    torch.manual_seed(1)
    seed, kept = int(torch.randint(2**62, ())), 0
    golden, first, second = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
    for index in (row * 48 + column for row in range(48) for column in range(row + 1)):  # of the weights that are seen
        bits = ((index + 1) * golden + seed * first) % 2**64
        bits = (bits ^ bits >> 30) * first % 2**64
        bits = (bits ^ bits >> 27) * second % 2**64
        kept += (bits ^ bits >> 31) >> 63  # the first bit: kept with probability 1/2
    for which in ("flash_triton, tiles of 16", "flash_triton, tiles of 64", "flash_tiled, tiles of 16"):
        assert numbers(f"{which}: dropout kept NUMBER of NUMBER weights", text) == [kept, 48 * 49 / 2]
    assert "the same weights each time: True" in text


def test_a_line_that_is_left_out_of_the_kernel_shows_where_it_was_needed(executed):
    text = printed(executed, "def changed_kernels(")
    rows = {
        name: tuple(map(int, re.search(rf"(?m)^{name} +(\d+) +(\d+) +(\d+)$", text).groups()))
        for name in ("as it is", "no correction", "no offset", "no guard")
    }
    assert rows["as it is"] == (0, 0, 0)
    q, k, _ = normal(3, 48, 16)
    triangle = np.tri(48, dtype=bool)
    scores = np.where(triangle, q @ k.T / 4, -np.inf)
    risen = (scores[:, 16:] > scores[:, :16].max(axis=1, keepdims=True)).any(axis=1)
    assert rows["no correction"][:2] == (0, risen.sum())
    keep = np.tri(40, 48, 8, dtype=bool) & (np.arange(48) >= 20)  # the last 40 queries; 20 keys of padding
    sees = keep.any(axis=1)
    assert (~sees).sum() == 12
    last = np.where(keep, scores[8:], -np.inf)
    assert (
        rows["no correction"][2]
        == (last[sees][:, 32:] > last[sees][:, :32].max(axis=1, keepdims=True)).any(axis=1).sum()
    )
    too_few = keep & np.tri(40, 48, 0, dtype=bool)
    assert rows["no offset"] == (0, 0, (keep != too_few).any(axis=1).sum())
    assert rows["no guard"] == (0, 0, 40)  # no key of the first tile is seen by any row
    assert len(pictures(executed, "def changed_kernels(")) == 1


def test_without_triton_section_10_says_so_and_goes_on(committed):
    cells = [cell.source for cell in committed.cells if cell.cell_type == "code"]
    needed = [cells[0], cells[1], *(cell for cell in cells if "KERNELS" in cell)]
    assert len(needed) == 4
    source = "import sys\nsys.modules['triton'] = None\n" + "\n".join(needed).replace("%matplotlib inline", "")
    done = subprocess.run([sys.executable, "-"], input=source, text=True, capture_output=True, cwd=FOLDER, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"TRITON_INTERPRET=1: triton .*\n    what to do: pip install triton\n", done.stdout)
    assert done.stdout.count("the kernels are left out here") == 2


def test_the_exercises_run(committed):
    text = run_exercises(committed, needs=("%matplotlib inline",))
    not_rescaled = (4 + 4 + 2 + 4) / (0.5 + 1 + 1 + 0.25)  # on paper
    assert f"{not_rescaled:.4f}, and {40 / 8:.4f} is right" in text
    tiles = {"causal": 0, "causal+window": 0}
    for i in range(8):
        tiles["causal"] += i + 1
        tiles["causal+window"] += 1 if i == 0 else 2
    for kind, count in tiles.items():
        assert numbers(rf"(?m)^{re.escape(kind)} NUMBER \[", text) == [count]
    assert "none passed" in text
    assert "rows that may see nothing are NaN" in text
