"""Each guard of the GPU kernels is needed: taken out, one at a time, a small case fails.

A mutation changes a piece of the kernels' text (or of a function in flash_triton.py), and names the case of the battery
that must notice. The battery runs in Triton's interpreter with every load and store watched (watched_memory.py).

Not here, since nothing can show them: guards behind which a second one stands. `other=-2` and the +inf for rows that do
not exist (their gradient is 0 already), `minimum(key_len, ...)` of the loops' ends (the tiles behind are masked).
"""

import ast
import sys
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

import CMHA.implementations
from CMHA.dropout import keep_mask
from CMHA.implementations import flash_triton
from CMHA.masks import AttentionMask
from orchestrator.evaluation.cases import Case, mask_of, tensors
from orchestrator.evaluation.parity import errors, expectation, measure, results
from tests.CMHA.implementations.watched_memory import watched
from tests.triton_interpreter import DEVICE, KERNELS

FOLDER = Path(__file__).parent.parent.parent.parent / "CMHA" / "implementations"

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="a load outside a tensor would end the process on a GPU")


# --- the battery -------------------------------------------------------------------------------------------------


SMALL = Case(head_dim=16, query_len=20, key_len=37, num_heads=1, num_kv_heads=1, batch_size=1, seed=1,
             query_block_size=16, kv_block_size=16)  # fmt: skip
CASES = {
    "causal": replace(SMALL, head_dim=20, strided=True),
    "grouped": replace(SMALL, query_len=10, key_len=17, num_heads=4, num_kv_heads=2, causal=False),
    "full": replace(SMALL, causal=False),
    "ends_with_a_tile": replace(SMALL, query_len=32, key_len=32),
    "few_queries": replace(SMALL, query_len=5, key_len=75),
    "more_queries_than_keys": replace(SMALL, query_len=57, key_len=20),
    "tall_tiles": replace(SMALL, query_len=50, key_len=50, query_block_size=32),
    "wide_tiles": replace(SMALL, query_len=50, key_len=50, kv_block_size=32),
    "padding": replace(SMALL, query_len=37, padding="left", poison=True, batch_size=2),
    "row": replace(SMALL, query_len=37, padding="row", causal=False),
    "documents": replace(SMALL, query_len=33, documents=True, batch_size=2),
    "documents_full": replace(SMALL, query_len=33, documents=True, causal=False),
    "window": replace(SMALL, query_len=37, window=7),
    "window_full": replace(SMALL, query_len=50, key_len=60, window=2, causal=False),
    "bf16": replace(SMALL, dtype=torch.bfloat16),
}


def run(case: Case, module=flash_triton) -> tuple[dict, list]:
    """What the kernels give: {"context", "dQ", "dK", "dV"}, and the inputs."""
    inputs, grad_context, padding_mask = tensors(case)
    blocks = {"query_block_size": case.query_block_size, "kv_block_size": case.kv_block_size}
    context, _ = module.attention(*inputs, mask_of(case, padding_mask), scale=case.scale, **blocks)
    context.backward(grad_context)
    return results(context, inputs), inputs


@cache
def expected(name: str):
    return expectation(CASES[name])


def within_the_bound(name: str) -> bool:
    """One case of the grid's kind; a row that sees nothing must be exactly 0."""
    found, _ = run(CASES[name])
    exact, bound = expected(name)
    error = errors(found, exact)
    empty = (exact["context"] == 0).all(-1)
    zero = (found["context"][empty] == 0).all() and (found["dQ"][empty] == 0).all()
    return bool(zero) and all(error[key] <= bound[key] for key in error)  # NaN is not


def matches(context, inputs, grad_context, exact_context, leaves) -> bool:
    context.backward(grad_context)
    exact_context.backward(grad_context.double())
    pairs = zip((context, *(x.grad for x in inputs)), (exact_context, *(x.grad for x in leaves)), strict=True)
    return all(torch.allclose(found.double(), exact, rtol=1e-4, atol=1e-5) for found, exact in pairs)


def dropout() -> bool:
    """Grouped heads and two sequences, against the formula with CMHA/dropout.py's table."""
    case = replace(SMALL, query_len=10, num_heads=2, num_kv_heads=1, batch_size=2)
    inputs, grad_context, _ = tensors(case)
    mask, blocks = AttentionMask(10, 37), {"query_block_size": 16, "kv_block_size": 16}
    torch.manual_seed(3)
    seed = int(torch.randint(2**62, (1,)))
    torch.manual_seed(3)
    context, _ = flash_triton.attention(*inputs, mask, scale=case.scale, dropout=0.3, **blocks)
    q, k, v = leaves = [tensor.detach().double().requires_grad_() for tensor in inputs]
    scores = (q @ k.mT * case.scale).masked_fill(~mask.dense(), -torch.inf)
    kept = keep_mask(seed, (2, 2, 10, 37), slice(0, 10), slice(0, 37), 0.3)
    exact = (scores.softmax(-1) * kept / 0.7) @ v
    return matches(context, inputs, grad_context, exact, leaves)


def steep() -> bool:
    """Scores between -3000 and -1000 that rise and fall from tile to tile: without the running maximum, 0 / 0."""
    height = torch.linspace(1, 3, 48)
    keys = torch.stack([height, height.flip(0)])[None, :, :, None].expand(1, 2, 48, 16) * 10
    inputs = [(-torch.ones(1, 2, 20, 16) * 100 / 16), keys, torch.randn(1, 2, 48, 16)]
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    mask, blocks = AttentionMask(20, 48, causal=False), {"query_block_size": 16, "kv_block_size": 16}
    context, _ = flash_triton.attention(*inputs, mask, scale=1.0, **blocks)
    q, k, v = (tensor.detach().double() for tensor in inputs)
    context_matches = torch.allclose(context.double(), (q @ k.mT).softmax(-1) @ v, rtol=1e-3, atol=1e-3)
    context.sum().backward()
    return context_matches and all(bool(tensor.grad.isfinite().all()) for tensor in inputs)


def far_apart(step: str) -> bool:
    """Tensors whose tokens, heads or sequences lie 2**30 numbers apart: the third begins behind 2**31. Memory that
    nobody touches costs nothing."""
    shape = {"token": (1, 1, 3, 16), "head": (1, 3, 1, 16), "batch": (3, 1, 1, 16)}[step]
    axis = shape.index(3)
    strides = [16, 16, 16, 1]
    strides[axis] = 2**30
    memory = torch.empty(2**31 + 16, dtype=torch.float16)
    spread = memory.as_strided(shape, strides)
    near = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    spread.copy_(near)
    outcomes = []
    for tensor in (spread, near):
        leaf = tensor.detach().requires_grad_()
        mask = AttentionMask(shape[2], shape[2])
        context, _ = flash_triton.attention(leaf, leaf, leaf, mask, scale=1.0, query_block_size=16, kv_block_size=16)
        grads = torch.autograd.grad(context, leaf, tensor)  # the gradient lies as far apart
        outcomes.append((context.detach(), grads[0]))
    return all(torch.equal(found, exact) for found, exact in zip(*outcomes, strict=True))


def one_key() -> bool:
    """dQ and dK are exactly 0, a difference of two equal dot products: the plain formula is almost exact there."""
    case = replace(SMALL, head_dim=128, query_len=5, key_len=1, causal=False, query_block_size=None, kv_block_size=None)
    return all(measure("flash_triton", replace(case, seed=seed)).passed for seed in range(8))


BATTERY = {name: lambda name=name: within_the_bound(name) for name in CASES} | {
    "dropout": dropout,
    "steep": steep,
    "one_key": one_key,
    "far_tokens": lambda: far_apart("token"),
    "far_heads": lambda: far_apart("head"),
    "far_sequences": lambda: far_apart("batch"),
}


def passes(name: str, monkeypatch) -> bool:
    """Whether the numbers are right and no access was wrong. Any other error is a mutation that is no program."""
    with watched(monkeypatch) as watch:
        try:
            return BATTERY[name]()
        except Exception:
            if watch.wrong is None:
                raise
            return False


@pytest.mark.parametrize("name", BATTERY)
def test_the_kernels_as_they_are_pass_the_battery(name, kernels, monkeypatch):
    with watched(monkeypatch):
        assert BATTERY[name]()


# --- the mutations -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutation:
    """What is changed and which case of the battery must notice.

    Attributes:
        name: what is taken out.
        case: of BATTERY.
        old, new: text of the kernels' file, or of the function `of` in flash_triton.py.
        where: the function in which `old` stands.
    """

    name: str
    case: str
    where: str
    old: str
    new: str
    file: str = "flash_triton_kernels.py"

    def __str__(self) -> str:
        return f"{self.where}-{self.name}"


def at_call(name, case, old, new, where="numbers"):
    return Mutation(name, case, where, old, new, file="flash_triton.py")


ROWS, COLUMNS = "(rows < length)[:, None]", "(column < HEAD_DIM)[None, :]"
EXISTS = "mask=rows < query_len"
MUTATIONS = [
    # Loads and stores.
    Mutation("rows_masked", "full", "load", f"mask={ROWS} & {COLUMNS}", f"mask={COLUMNS} | ({ROWS} & False)"),
    Mutation("columns_masked", "causal", "load", f"mask={ROWS} & {COLUMNS}",
             f"mask={ROWS} & (column < WIDTH)[None, :]"),
    Mutation("zero_in_columns_that_are_not_there", "causal", "load", "other=0.0", "other=INFINITY"),
    Mutation("columns_masked_in_whole_tiles", "causal", "load", "EDGE or HEAD_DIM != WIDTH", "EDGE"),
    Mutation("rows_masked_at_the_edge", "full", "load", "EDGE or HEAD_DIM != WIDTH", "HEAD_DIM != WIDTH"),
    Mutation("rows_in_int64", "far_tokens", "load", "rows.to(tl.int64)[:, None]", "rows[:, None]"),
    Mutation("widened_for_the_interpreter", "bf16", "load", "if WIDEN:", "if False:"),
    Mutation("rows_masked", "full", "store", f"mask={ROWS} & {COLUMNS}", f"mask={COLUMNS} | ({ROWS} & False)"),
    Mutation("columns_masked", "causal", "store", f"mask={ROWS} & {COLUMNS}",
             f"mask={ROWS} & (column < WIDTH)[None, :]"),
    Mutation("masked", "padding", "load_texts", "mask=tokens < length", "mask=tokens >= 0"),
    Mutation("of_this_sequence", "documents", "load_texts", "batch * length + ", ""),
    Mutation("queries_masked", "full", "forward", "query_len, HEAD_DIM, WIDTH, WIDEN, True)",
             "query_len, HEAD_DIM, WIDTH, WIDEN, False)"),
    Mutation("log_sum_exp_masked", "full", "forward", f"row_lse, {EXISTS}", "row_lse"),
    Mutation("masked", "full", "backward_delta", f", {EXISTS}", ""),
    Mutation("queries_masked", "full", "backward_dkdv", "q_token, query_len, HEAD_DIM, WIDTH, WIDEN, True)",
             "q_token, query_len, HEAD_DIM, WIDTH, WIDEN, EDGE)"),
    Mutation("grad_context_masked", "full", "backward_dkdv", "do_token, query_len, HEAD_DIM, WIDTH, WIDEN, True)",
             "do_token, query_len, HEAD_DIM, WIDTH, WIDEN, EDGE)"),
    Mutation("keys_masked", "full", "backward_dkdv", "k_token, key_len, HEAD_DIM, WIDTH, WIDEN, True)",
             "k_token, key_len, HEAD_DIM, WIDTH, WIDEN, False)"),
    Mutation("values_masked", "full", "backward_dkdv", "v_token, key_len, HEAD_DIM, WIDTH, WIDEN, True)",
             "v_token, key_len, HEAD_DIM, WIDTH, WIDEN, False)"),
    Mutation("log_sum_exp_masked", "full", "backward_dkdv", f", {EXISTS}, other=INFINITY", ""),
    Mutation("log_sum_exp_of_no_row_is_large", "full", "backward_dkdv", "other=INFINITY", "other=-INFINITY"),
    Mutation("delta_masked", "full", "backward_dkdv", f", {EXISTS}, other=0.0", ""),
    Mutation("queries_masked", "full", "backward_dq", "q_token, query_len, HEAD_DIM, WIDTH, WIDEN, True)",
             "q_token, query_len, HEAD_DIM, WIDTH, WIDEN, False)"),
    Mutation("grad_context_masked", "full", "backward_dq", "do_token, query_len, HEAD_DIM, WIDTH, WIDEN, True)",
             "do_token, query_len, HEAD_DIM, WIDTH, WIDEN, False)"),
    Mutation("log_sum_exp_masked", "full", "backward_dq", f", {EXISTS}, other=INFINITY", ""),
    Mutation("delta_masked", "full", "backward_dq", f", {EXISTS}, other=0.0", ""),
    # Offsets in int64.
    *(Mutation(f"{one}_in_int64", case, kernel, old, new)
      for one, case, new in (("sequence", "far_sequences", "(table // heads), (table % heads).to(tl.int64)"),
                             ("head", "far_heads", "(table // heads).to(tl.int64), (table % heads)"))
      for kernel in ("forward", "backward_delta", "backward_dq")
      for old in ("(table // heads).to(tl.int64), (table % heads).to(tl.int64)",)),
    Mutation("sequence_in_int64", "far_sequences", "backward_dkdv", "(kv_table // kv_heads).to(tl.int64)",
             "(kv_table // kv_heads)"),
    Mutation("head_in_int64", "far_heads", "backward_dkdv", "(kv_table % kv_heads).to(tl.int64)",
             "(kv_table % kv_heads)"),
    # Who sees whom.
    Mutation("offset", "causal", "masked", "(key_len - query_len)", "0"),
    Mutation("keys_behind_the_end", "full", "masked", "(columns < key_len)[None, :]", "(columns >= 0)[None, :]"),
    Mutation("own_key_seen", "causal", "masked", "ahead >= 0", "ahead > 0"),
    Mutation("later_keys_hidden", "causal", "masked", "if CAUSAL:", "if False:"),
    Mutation("window_ends", "window", "masked", "(ahead < window)", "(ahead <= window)"),
    Mutation("window_ends_ahead_too", "window_full", "masked", "(ahead > -window)", "(ahead >= -window)"),
    Mutation("other_texts_hidden", "documents", "masked", "text_of_q[:, None] == text_of_k[None, :]",
             "text_of_q[:, None] >= text_of_k[None, :]"),
    Mutation("hidden_is_minus_infinity", "row", "masked", "scores, -INFINITY)", "scores, -1e30)"),
    Mutation("offset", "causal", "visible_keys", "first + key_len - query_len", "first"),
    Mutation("last_key_of_the_tile", "causal", "visible_keys", "end = tl.minimum(key_len, position + BLOCK_Q)\n",
             "end = tl.minimum(key_len, position + BLOCK_Q - 1)\n"),
    Mutation("start_not_before_the_first_key", "window", "visible_keys", "tl.maximum(0, position - window + 1)",
             "position - window + 1"),
    Mutation("first_key_of_the_window", "window", "visible_keys", "position - window + 1", "position - window + 2"),
    Mutation("last_key_of_the_window", "window_full", "visible_keys", "position + BLOCK_Q - 1 + window)",
             "position + BLOCK_Q - 3 + window)"),
    Mutation("whole_tiles_for_the_first_query_too", "causal", "visible_keys", "key_len, position + 1)",
             "key_len, position + BLOCK_Q)"),
    Mutation("no_whole_tile_before_the_first_key", "more_queries_than_keys", "visible_keys",
             "tl.maximum(0, tl.minimum(key_len, position + 1))", "tl.minimum(key_len, position + 1)"),
    Mutation("whole_tiles_are_whole", "causal", "visible_keys", "seen_by_all // BLOCK_K * BLOCK_K", "seen_by_all"),
    Mutation("no_whole_tile_behind_the_end", "full", "visible_keys", "seen_by_all // BLOCK_K * BLOCK_K",
             "tl.cdiv(seen_by_all, BLOCK_K) * BLOCK_K"),
    Mutation("no_whole_tile_under_texts", "documents", "visible_keys", "not (WINDOW or TEXTS)", "not WINDOW"),
    Mutation("no_whole_tile_under_a_window", "window", "visible_keys", "not (WINDOW or TEXTS)", "not TEXTS"),
    Mutation("offset", "causal", "seeing_queries", "key_len - query_len\n", "0\n"),
    Mutation("start_not_before_the_first_query", "few_queries", "seeing_queries", "tl.maximum(0, first - offset)",
             "first - offset"),
    Mutation("window_start_not_before_the_first_query", "window_full", "seeing_queries",
             "tl.maximum(0, first - offset - window + 1)", "first - offset - window + 1"),
    Mutation("first_query_of_the_window", "window_full", "seeing_queries", "first - offset - window + 1",
             "first - offset - window + 2"),
    Mutation("last_query_of_the_window", "window_full", "seeing_queries", "offset + window)", "offset + window - 2)"),
    Mutation("whole_tiles_for_the_last_key_too", "ends_with_a_tile", "seeing_queries",
             "tl.maximum(start, first + BLOCK_K - 1 - offset)", "tl.maximum(start, first - offset)"),
    Mutation("whole_tiles_begin_behind_the_cut_ones", "ends_with_a_tile", "seeing_queries",
             "tl.cdiv(sees_all - start, BLOCK_Q)", "((sees_all - start) // BLOCK_Q)"),
    Mutation("no_whole_tile_before_the_start", "few_queries", "seeing_queries",
             "tl.maximum(start, first + BLOCK_K - 1 - offset)", "first + BLOCK_K - 1 - offset"),
    Mutation("no_whole_tile_under_texts", "documents", "seeing_queries", "not (WINDOW or TEXTS)", "not WINDOW"),
    Mutation("no_whole_tile_under_a_window", "window", "seeing_queries", "not (WINDOW or TEXTS)", "not TEXTS"),
    # The online softmax.
    Mutation("starts_at_minus_infinity", "steep", "forward", "tl.full([BLOCK_Q], -INFINITY", "tl.full([BLOCK_Q], 0.0"),
    Mutation("maximum_never_falls", "tall_tiles", "forward", "tl.maximum(running_max, tl.max(scores, 1))",
             "tl.max(scores, 1)"),
    Mutation("shift_where_nothing_is_seen", "more_queries_than_keys", "forward",
             "tl.where(new_max == -INFINITY, 0.0, new_max)", "new_max"),
    Mutation("sum_rescaled", "full", "forward", "running_sum * correction", "running_sum"),
    Mutation("accumulation_rescaled", "full", "forward", "accumulated * correction[:, None]", "accumulated"),
    Mutation("dead_row_is_0", "more_queries_than_keys", "forward", "nothing_seen = running_sum == 0",
             "nothing_seen = running_sum < 0"),
    Mutation("dead_row_divides_by_1", "more_queries_than_keys", "forward",
             "accumulated / tl.where(nothing_seen, 1.0, running_sum)[:, None]", "accumulated / running_sum[:, None]"),
    Mutation("log_sum_exp_of_a_dead_row", "more_queries_than_keys", "forward",
             "tl.where(nothing_seen, INFINITY, running_max", "tl.where(nothing_seen, -INFINITY, running_max"),
    Mutation("log_in_units_of_log_2", "full", "forward", "tl.log2(", "tl.log("),
    Mutation("scale", "full", "forward", "tl.trans(k)) * scale", "tl.trans(k))"),
    Mutation("scale", "full", "backward_dkdv", "tl.trans(k)) * scale", "tl.trans(k))"),
    Mutation("scale", "full", "backward_dq", "tl.trans(k)) * scale", "tl.trans(k))"),
    Mutation("grad_scale", "full", "backward_dkdv", "grad_k *= grad_scale", "grad_k *= 1.0"),
    Mutation("grad_scale", "full", "backward_dq", "grad_q *= grad_scale", "grad_q *= 1.0"),
    Mutation("delta", "full", "backward_dkdv", "(grad_weights - row_delta[:, None])", "grad_weights"),
    Mutation("delta", "full", "backward_dq", "(grad_weights - row_delta[:, None])", "grad_weights"),
    Mutation("delta_rounded_as_grad_weights_are", "one_key", "backward_delta",
             "tl.sum(tl.where(diagonal, product(grad_o, tl.trans(o)), 0.0), 1)", "tl.sum(grad_o * o, 1)"),
    Mutation("delta_is_the_diagonal", "full", "backward_delta", "tl.where(diagonal, ", "tl.where(diagonal | True, "),
    Mutation("edge_tiles_masked", "causal", "forward", "if EDGE:", "if False:"),
    Mutation("edge_tiles_masked", "causal", "backward_dkdv", "if EDGE:", "if False:"),
    Mutation("edge_tiles_masked", "causal", "backward_dq", "if EDGE:", "if False:"),
    Mutation("whole_tiles_met", "causal", "forward", "start, end if EDGE else whole", "whole, end if EDGE else whole"),
    # Heads and programs.
    Mutation("summed_over_the_group", "grouped", "backward_dkdv", "range(0, group)", "range(0, 1)"),
    Mutation("heads_of_a_group_stand_together", "grouped", "backward_dkdv", "kv_head * group + member",
             "kv_head + member * kv_heads"),
    Mutation("key_head_of_the_group", "grouped", "forward", "head // group", "head % (heads // group)"),
    Mutation("key_head_of_the_group", "grouped", "backward_dq", "head // group", "head % (heads // group)"),
    Mutation("each_tile_once", "full", "tile_of_program", "program % tiles", "program % 1"),
    # Dropout.
    Mutation("sum_before_it", "dropout", "forward", "tl.sum(weights, 1)",
             "tl.sum(drop(weights, keep_mask(seed, table, query_len, key_len, rows, columns, threshold, DROPOUT), "
             "keep_scale, DROPOUT), 1)"),
    Mutation("in_the_context", "dropout", "forward", "weights = drop(weights, keep, keep_scale, DROPOUT)", "pass"),
    Mutation("in_grad_values", "dropout", "backward_dkdv", "drop(weights, keep, keep_scale, DROPOUT)", "weights"),
    Mutation("in_grad_keys", "dropout", "backward_dkdv",
             "drop(product(grad_o, tl.trans(v)), keep, keep_scale, DROPOUT)", "product(grad_o, tl.trans(v))"),
    Mutation("in_grad_queries", "dropout", "backward_dq",
             "drop(product(grad_o, tl.trans(v)), keep, keep_scale, DROPOUT)", "product(grad_o, tl.trans(v))"),
    Mutation("the_head_counts", "dropout", "backward_dkdv", "table = batch * heads + head", "table = kv_table"),
    Mutation("the_kept_made_larger", "dropout", "drop", "tile * keep_scale", "tile"),
    Mutation("kept_above_the_threshold", "dropout", "keep_mask", ">= threshold", "< threshold"),
    Mutation("each_head_its_own", "dropout", "keep_mask", "table.to(tl.uint64) * query_len", "table.to(tl.uint64) * 0"),
    Mutation("absolute_position", "dropout", "keep_mask", "* key_len + columns[None, :]",
             "* key_len + columns[None, :] % 16"),
    Mutation("seed", "dropout", "keep_mask", "tl.load(seed).to(tl.uint64)", "1"),
    # What is told to the kernels.
    at_call("log2_e_in_the_scale", "full", "scale * LOG2_E", "scale"),
    at_call("threshold", "dropout", "2**31", "2**30"),
    at_call("keep_scale", "dropout", "1.0 / (1.0 - dropout)", "1.0"),
    at_call("padding_is_no_text", "padding", "~mask.padding_mask, -1)", "~mask.padding_mask, 0)", where="texts_of"),
    at_call("queries_stand_at_the_last_keys", "documents", "mask.offset :", ": mask.query_len", where="texts_of"),
]  # fmt: skip


def mutated(mutation: Mutation) -> tuple[str, str]:
    """The file's text after the change, and the function's alone."""
    text = (FOLDER / mutation.file).read_text(encoding="utf-8")
    (node,) = [
        node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == mutation.where
    ]
    lines = text.splitlines(keepends=True)
    first = node.lineno - 1
    function = "".join(lines[first : node.end_lineno])
    assert function.count(mutation.old) >= 1, f"no {mutation.old!r} in {mutation.where}"
    changed = function.replace(mutation.old, mutation.new)
    return "".join(lines[:first]) + changed + "".join(lines[node.end_lineno :]), changed


def put_in_place(mutation: Mutation, folder: Path, monkeypatch) -> None:
    """Let flash_triton use the changed kernels, or the changed function."""
    text, function = mutated(mutation)
    if mutation.file == "flash_triton.py":
        namespace = dict(vars(flash_triton))
        exec("from __future__ import annotations\n" + function, namespace)
        monkeypatch.setattr(flash_triton, mutation.where, namespace[mutation.where])
        return
    path = folder / "mutated_kernels.py"
    path.write_text(text, encoding="utf-8")
    spec = spec_from_file_location(KERNELS, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, KERNELS, module)
    monkeypatch.setattr(CMHA.implementations, KERNELS.rpartition(".")[2], module, raising=False)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_without_this_guard_a_case_fails(mutation, kernels, monkeypatch, tmp_path):
    put_in_place(mutation, tmp_path, monkeypatch)
    assert not passes(mutation.case, monkeypatch)
