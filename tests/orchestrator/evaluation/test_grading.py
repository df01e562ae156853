"""Grading: each case once, each failure seen, told where to look, and never hidden by the others."""

import math
import types
from dataclasses import replace
from itertools import product

import pytest
import torch

from CMHA.implementations import IMPLEMENTATIONS, eager, flash_tiled, sdpa
from CMHA.request import Reason
from orchestrator.evaluation import grading
from orchestrator.evaluation.cases import MASK_AXES, Case, grid
from orchestrator.evaluation.grading import (
    cases_to_grade,
    common_to_failures,
    failed,
    grade,
    known,
    load_implementation,
    refused,
    summarise,
)
from orchestrator.evaluation.parity import Measurement, measure

SMALL = [
    Case(head_dim=8, query_len=query_len, key_len=key_len, causal=causal, num_kv_heads=kv_heads)
    for query_len, key_len in ((7, 7), (3, 9))
    for causal in (True, False)
    for kv_heads in (4, 2)
]


def implementation(attention, **more):
    return types.SimpleNamespace(__name__="mine", attention=attention, check=lambda request: [], **more)


def graded(module, cases=SMALL) -> list[Measurement]:
    return [run for _, runs in grade(cases, {"mine": module}) for run in runs]


def test_an_implementation_that_is_right_passes_every_case():
    runs = graded(implementation(eager.attention))
    assert len(runs) == len(SMALL)
    assert all(run.passed and run.implementation == "mine" for run in runs)


def upper_left(queries, keys, values, mask, *, scale, dropout=0.0):
    """The classic mistake: aligned to the first key."""
    shifted = types.SimpleNamespace(dense=lambda: torch.ones(mask.query_len, mask.key_len).tril() == 1)
    return eager.attention(queries, keys, values, shifted if mask.causal else mask, scale=scale, dropout=dropout)


def test_what_all_failures_have_in_common_says_where_to_look():
    runs = graded(implementation(upper_left))
    assert {run.case for run in runs if failed(run)} == {c for c in SMALL if c.causal and c.query_len == 3}
    assert common_to_failures(runs) == ["fewer queries than keys", "a causal mask"]


def test_a_right_output_with_wrong_gradients_is_told_apart():
    def detached(queries, keys, values, mask, *, scale, dropout=0.0):
        return eager.attention(queries, keys.detach() + 0 * keys, values, mask, scale=scale)

    runs = graded(implementation(detached))
    assert all(run.missed for run in runs)
    assert common_to_failures(runs) == ["a right output and wrong gradients"]


def test_an_error_inside_is_a_failure_with_its_text_and_place_and_the_others_go_on():
    def raises(queries, keys, values, mask, *, scale, dropout=0.0):
        if keys.shape[1] == 2:
            raise ZeroDivisionError("no groups today")
        return eager.attention(queries, keys, values, mask, scale=scale)

    runs = graded(implementation(raises))
    bad = [run for run in runs if failed(run)]
    assert [run.case.num_kv_heads for run in bad] == [2] * 4
    assert all(
        run.failure.startswith("raised ZeroDivisionError: no groups today (test_grading.py, line ") for run in bad
    )
    assert all(math.isnan(value) for value in bad[0].error.values())
    assert common_to_failures(runs)[0] == "grouped heads"


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda q, v: q, r"must return \(context, weights or None\), got Tensor"),
        (lambda q, v: (q[:, :1], None), r"must be torch.float32 \(2, 4, 7, 8\), as the queries; got .*\(2, 1, 7, 8\)"),
        (lambda q, v: (q.double(), None), r"got torch.float64"),
        (lambda q, v: (None, None), r"got tuple"),
    ],
)
def test_what_is_not_a_context_is_told_and_never_broadcast(returned, message):
    def attention(queries, keys, values, mask, *, scale, dropout=0.0):
        return returned(queries, values)

    with pytest.raises(ValueError, match=message):
        measure(attention, SMALL[0])


def test_rows_that_may_see_nothing_must_be_exactly_zero_however_small_they_are():
    def nearly(queries, keys, values, mask, *, scale, dropout=0.0):
        return eager.attention(queries, keys, values, mask, scale=scale)[0] + 1e-12, None

    case = Case(head_dim=8, query_len=7, key_len=7, padding="row")
    run = measure(nearly, case)
    assert run.missed == []
    assert run.failure == "28 of 28 rows that may see nothing are not exactly 0"  # 4 heads of 7 queries
    assert failed(run)
    assert measure(eager, case).passed


def test_poison_in_the_padding_must_not_get_through():
    """A trace of what is hidden, too small to be seen unless the hidden numbers are large."""

    def leaks(queries, keys, values, mask, *, scale, dropout=0.0):
        context, _ = eager.attention(queries, keys, values, mask, scale=scale)
        return context + 1e-9 * values.mean(dim=2, keepdim=True), None

    case = Case(head_dim=8, query_len=9, key_len=9, padding="left")
    assert measure(leaks, case).missed == []
    assert "context" in measure(leaks, replace(case, poison=True)).missed
    assert measure(eager, replace(case, poison=True)).passed


def test_the_bound_of_a_poisoned_case_is_that_of_the_clean_one():
    case = Case(head_dim=8, query_len=9, key_len=9, padding="left")
    assert measure("eager", replace(case, poison=True)).bound == measure("eager", case).bound


def test_one_without_block_sizes_is_measured_once_where_only_they_differ_and_one_with_them_each_time():
    cases = [replace(SMALL[0], query_block_size=b, kv_block_size=b) for b in (2, 4, 8)] + [SMALL[1]]
    runs = [run for _, measured in grade(cases, {"sdpa": sdpa, "flash_tiled": flash_tiled}) for run in measured]
    assert [run.case for run in runs if run.implementation == "sdpa"] == [cases[0], cases[3]]
    assert [run.case for run in runs if run.implementation == "flash_tiled"] == cases


def test_in_the_full_grid_cases_that_differ_in_their_tiles_alone_follow_each_other_with_the_same_numbers():
    for number, case in enumerate(grid(pairwise=False)):
        if number % 4 == 0:
            first = case
        assert replace(case, query_block_size=None, kv_block_size=None) == replace(
            first, query_block_size=None, kv_block_size=None
        )
        if number == 400:
            break


def test_a_case_that_its_own_check_refuses_is_not_measured_and_one_it_takes_without_gradients_is_measured_forward():
    no = Reason("no", "it does not", "do not")

    def check(request):
        return [no] if request.num_kv_heads == 2 or request.needs_grad else []

    runs = graded(types.SimpleNamespace(__name__="mine", attention=eager.attention, check=check))
    assert {run.case.num_kv_heads for run in runs} == {4}
    assert all(set(run.error) == {"context"} and run.passed for run in runs)
    (row,) = summarise(runs)
    assert row["gradients"] is None
    assert row["forward"] < 1


def test_queries_that_are_padding_may_give_zero_where_the_implementation_says_so():
    def zeroes(queries, keys, values, mask, *, scale, dropout=0.0):
        context, _ = eager.attention(queries, keys, values, mask, scale=scale)
        return context * mask.padding_mask[:, None, mask.offset :, None], None

    case = Case(head_dim=8, query_len=9, key_len=9, padding="right")
    assert measure(implementation(zeroes, PADDED_QUERIES_GIVE_ZERO=True), case).passed
    assert not measure(implementation(zeroes), case).passed
    assert not measure(implementation(eager.attention, PADDED_QUERIES_GIVE_ZERO=True), case).passed


# --- the rows ------------------------------------------------------------------------------------------------


def run_with(dtype=torch.float32, ratio=0.5, implementation="mine", **case) -> Measurement:
    return Measurement(
        implementation, Case(dtype, **case), {"context": ratio, "dQ": ratio / 2}, {"context": 1.0, "dQ": 1.0}, 0.0
    )


def test_a_row_holds_the_largest_of_its_implementation_and_dtype():
    rows = summarise([run_with(ratio=0.5), run_with(ratio=0.75), run_with(torch.float16, 0.125), run_with(ratio=2.0)])
    assert [(row["dtype"], row["cases"], row["failed"]) for row in rows] == [("float32", 3, 1), ("float16", 1, 0)]
    assert (rows[0]["forward"], rows[0]["gradients"]) == (2.0, 1.0)
    assert (rows[1]["forward"], rows[1]["gradients"]) == (0.125, 0.0625)


def test_a_nan_is_the_largest_of_all():
    for order in ((math.nan, 0.5), (0.5, math.nan)):
        (row,) = summarise([run_with(ratio=ratio) for ratio in order])
        assert math.isnan(row["forward"])
        assert row["failed"] == 1


def test_the_known_rounding_of_torchs_op_is_exactly_that_and_no_more():
    one = {"query_len": 1, "key_len": 1}
    miss = Measurement("sdpa", Case(**one), {"context": 0.0, "dQ": 1.5}, {"context": 1.0, "dQ": 1.0}, 0.0)
    assert known(miss)
    assert not failed(miss)
    for other in (
        replace(miss, implementation="flash_tiled"),
        replace(miss, case=Case(torch.bfloat16, **one)),
        replace(miss, case=Case(query_len=2, key_len=2)),
        replace(miss, error={"context": 1.5, "dQ": 1.5}),
        replace(miss, error={"context": 0.0, "dQ": math.nan}),
        replace(miss, error={"context": 0.0, "dQ": 3.0}),
        replace(miss, failure="raised"),
    ):
        assert failed(other)
    (row,) = summarise([miss])
    assert (row["failed"], row["known"], row["gradients"]) == (0, 1, None)


# --- the cases ---------------------------------------------------------------------------------------------------


def test_what_is_graded_is_the_grid_and_every_product_of_the_rules_of_a_mask():
    cases = cases_to_grade()
    assert cases == [*grid(), *grid(axes=MASK_AXES)]
    met = {(case.causal, case.padding, case.documents, bool(case.window)) for case in cases[len(list(grid())) :]}
    assert met == set(product((True, False), ("none", "right", "left", "row"), (True, False), (True, False)))
    assert {case.poison for case in cases if case.padding == "row"} == {True, False}
    assert {case.dtype for case in cases_to_grade(dtype=torch.float16)} == {torch.float16}
    assert {case.device for case in cases_to_grade(device="meta")} == {"meta"}


@pytest.mark.parametrize("case", list(grid(axes=MASK_AXES)), ids=str)
def test_every_usable_implementation_meets_the_bound_under_every_kind_of_mask(case):
    without_compiler = {name: module for name, module in IMPLEMENTATIONS.items() if name != "flex_attention"}
    runs = [run for _, measured in grade([case], without_compiler) for run in measured]
    assert {"eager", "sdpa", "flash_tiled"} <= {run.implementation for run in runs}
    assert [(run.implementation, run.failure, run.ratio) for run in runs if failed(run)] == []


def test_an_implementation_that_serves_nothing_here_is_named_with_its_reasons(monkeypatch):
    never = types.SimpleNamespace(check=lambda request: [Reason("no_moon", "the moon is not full", "wait")])
    monkeypatch.setitem(IMPLEMENTATIONS, "moon", never)
    assert refused(SMALL, {"moon": never, "eager": eager}) == {"moon": ["the moon is not full"]}
    assert refused(SMALL)["moon"] == ["the moon is not full"]
    assert "eager" not in refused(SMALL)


# --- a file of one's own ------------------------------------------------------------------------------------------


RIGHT = """
import torch
def attention(queries, keys, values, mask, *, scale, dropout=0.0):
    group = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = (queries @ keys.mT * scale).masked_fill(~mask.dense(), -1e4)
    return scores.softmax(-1).masked_fill(~mask.dense(), 0) @ values, None
"""


def test_a_file_with_one_function_is_an_implementation(tmp_path):
    (tmp_path / "my_own.py").write_text(RIGHT)
    assert all(run.passed for run in graded(load_implementation(tmp_path / "my_own.py")))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gone.py", None, "expects a Python file"),
        ("text.txt", "hello", "expects a Python file"),
        ("empty.py", "", "has no function `attention`; wanted: attention"),
        ("value.py", "attention = 3", "has no function `attention`"),
        ("broken.py", "def attention(:", "cannot be imported: it raised SyntaxError"),
        (
            "missing.py",
            "import no_such_module",
            r"raised ModuleNotFoundError: .*no_such_module.* \(missing.py, line 1\)",
        ),
        (
            "few.py",
            "def attention(q, k, v):\n    pass",
            "`attention` of few.py cannot be called: .*; wanted: attention",
        ),
    ],
)
def test_a_file_that_is_none_is_refused_with_what_is_wanted(name, text, message, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_implementation(tmp_path / name)


def test_one_that_is_thinned_out_is_measured_in_every_nth_case_and_the_others_in_all():
    cases = [Case(head_dim=8, query_len=length, key_len=length) for length in range(1, 18)]
    runs = [run for _, measured in grade(cases, {"sdpa": sdpa, "eager": eager}, {"sdpa": 7}) for run in measured]
    assert [run.case.query_len for run in runs if run.implementation == "sdpa"] == [1, 8, 15]
    assert [run.case.query_len for run in runs if run.implementation == "eager"] == list(range(1, 18))


def test_what_is_left_of_the_thinned_grid_has_every_dtype_both_kinds_of_mask_and_every_padding():
    cases = cases_to_grade()
    assert grading.thinning(cases, IMPLEMENTATIONS) == {"flex_attention": 7}
    assert grading.thinning(cases * 200, IMPLEMENTATIONS) == {"flex_attention": 2 * len(cases)}
    left = cases[::7]
    assert {case.dtype for case in left} == {torch.float32, torch.float16, torch.bfloat16}
    assert {(case.causal, case.padding) for case in left} == set(
        product((True, False), ("none", "right", "left", "row"))
    )
    assert {case.documents for case in left} == {bool(case.window) for case in left} == {True, False}
    assert len({(case.query_len, case.key_len) for case in left}) > 6


def test_what_was_compiled_is_forgotten_from_time_to_time(monkeypatch):
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    monkeypatch.setattr(grading, "KERNELS", 3)
    cases = [Case(head_dim=8, query_len=length, key_len=length) for length in range(1, 8)]
    list(grade(cases, {"sdpa": sdpa}))
    assert resets == []
    list(grade(cases, {"mine": implementation(eager.attention, COMPILES=True)}))
    assert len(resets) == 3


def test_what_comes_back_wrong_is_told_in_words_and_not_as_an_error_of_ours():
    def forgets_keys(queries, keys, values, mask, *, scale, dropout=0.0):
        return queries * 1.0, None

    def without_gradient(queries, keys, values, mask, *, scale, dropout=0.0):
        return eager.attention(queries, keys, values, mask, scale=scale)[0].detach(), None

    def one_head(queries, keys, values, mask, *, scale, dropout=0.0):
        return queries[:, :1], None

    def softmax_of_nothing(queries, keys, values, mask, *, scale, dropout=0.0):
        scores = (queries @ keys.mT * scale).masked_fill(~mask.dense(), -math.inf)
        return scores.softmax(-1) @ values, None

    case = Case(head_dim=8, query_len=7, key_len=7)
    (run,) = graded(implementation(forgets_keys), [case])
    assert run.failure is None
    assert {"context", "dQ", "dK", "dV"} == set(run.missed)
    (run,) = graded(implementation(without_gradient), [case])
    assert run.failure.startswith("the context has no gradient: was it computed under torch.no_grad()")
    (run,) = graded(implementation(one_head), [case])
    assert run.failure.startswith("the context must be torch.float32 (2, 4, 7, 8)")
    (run,) = graded(implementation(softmax_of_nothing), [replace(case, padding="row")])
    assert run.failure == "28 of 28 rows that may see nothing are NaN"


def test_one_that_ignores_the_scale_it_is_given_fails():
    def always_the_usual(queries, keys, values, mask, *, scale, dropout=0.0):
        return eager.attention(queries, keys, values, mask, scale=queries.shape[-1] ** -0.5)

    runs = graded(implementation(always_the_usual), [replace(SMALL[0], seed=seed) for seed in (0, 1)])
    assert [failed(run) for run in runs] == [False, True]
    assert {case.seed % 2 for case in cases_to_grade()} == {0, 1}


def test_short_cases_for_an_interpreter_are_both_grids_with_up_to_130_tokens():
    cases = cases_to_grade(short=True)
    assert max(max(case.query_len, case.key_len) for case in cases) == 130
    assert {case.window for case in cases} == {None, 7}  # the second grid is among them
    assert {case.head_dim for case in cases} == {case.head_dim for case in cases_to_grade()}
    assert len(cases) < len(cases_to_grade(short=True, full=True))
