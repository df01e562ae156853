"""Our kernel for sequences that write: the bound, the splits, the same bits whatever else there is, every address.

On a GPU where there is one, else in Triton's interpreter. Each guard of the kernel is taken out once, and a case of the
battery must notice. One cannot be shown by any: `if start >= length`, without which a program would leave behind a
stretch of no keys, which nobody reads.
"""

import ast
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import CMHA.implementations
from CMHA.implementations import paged_plain, paged_triton
from CMHA.paged_kv_cache import PagedMask
from tests.CMHA.implementations.paged_cases import KERNELS, TURNS, Batch, batches, import_kernels
from tests.CMHA.implementations.watched_memory import Watch, WrongAccessError, addresses
from tests.triton_interpreter import DEVICE

NAN = float("nan")
FILE = Path(__file__).parents[3].joinpath(*KERNELS.split(".")).with_suffix(".py")
IN_THE_INTERPRETER = pytest.mark.skipif(
    DEVICE != "cpu", reason="a load outside a tensor would end the process on a GPU"
)


@pytest.fixture
def short_splits(monkeypatch):
    """Stretches of 32 keys in tiles of 16, so that short texts have several of both."""
    monkeypatch.setattr(paged_triton, "SPLIT", 32)
    monkeypatch.setattr(paged_triton, "BLOCK_K", 16)


# --- the bound --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", TURNS, ids=str)
def test_every_block_size_and_width_is_within_the_bound(batch, kernels):
    batch = replace(batch, device=kernels)
    assert batch.error_over_bound(batch.read("triton")) <= 1


@pytest.mark.parametrize("batch", TURNS[::3], ids=str)
def test_so_it_is_in_several_stretches(batch, kernels, short_splits):
    batch = replace(batch, device=kernels)
    assert batch.error_over_bound(batch.read("triton")) <= 1


def test_so_is_any_mix_of_reading_and_writing(kernels, short_splits):
    @settings(max_examples=12)
    @given(batch=batches())
    def any_mix(batch):
        batch = replace(batch, device=kernels)
        assert batch.error_over_bound(batch.read("triton")) <= 1

    any_mix()


@pytest.mark.parametrize("length", [255, 256, 257, 600])
def test_so_are_lengths_around_a_whole_stretch_of_256_keys(length, kernels):
    batch = Batch((length - 1, 3), (1, 1), garbage=NAN, heads=2, kv_heads=1, device=kernels)
    assert batch.error_over_bound(batch.read("triton")) <= 1


@pytest.mark.parametrize("heads", [(1, 1), (7, 7), (20, 1), (40, 2), (64, 1)], ids=str)
def test_any_number_of_heads_may_share_a_key_head(heads, kernels):
    batch = Batch((20,), (1,), heads=heads[0], kv_heads=heads[1], garbage=NAN, device=kernels)
    assert batch.error_over_bound(batch.read("triton")) <= 1


@pytest.mark.parametrize("head_dim", [1, 129, 256])
def test_a_head_may_be_of_any_width_up_to_256(head_dim, kernels):
    batch = Batch((40, 2), (1, 1), head_dim=head_dim, garbage=NAN, device=kernels)
    assert batch.error_over_bound(batch.read("triton")) <= 1


@pytest.mark.parametrize("new", [(1, 1, 1), (5, 7, 2), (1, 6, 1)], ids=["write", "read", "both"])
def test_who_writes_goes_through_the_kernel_and_who_reads_through_plain(new, kernels, monkeypatch):
    batch, seen = Batch((9, 30, 2), new, garbage=NAN, device=kernels), []
    for module, name in ((paged_triton, "decode"), (paged_plain, "read_into")):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda context, part, *a, _n=name, _r=real, **k: seen.append((_n, len(
                part.lengths if _n == "decode" else part))) or _r(context, part, *a, **k))  # fmt: skip
    assert batch.error_over_bound(batch.read("triton")) <= 1
    writing = sum(count == 1 for count in new)
    assert seen == [("read_into", 3 - writing)] + [("decode", writing)] * (writing > 0)


def test_under_autocast_the_pool_may_be_wider_than_the_queries(kernels):
    batch = Batch((40, 2), (1, 1), dtype=torch.bfloat16, garbage=NAN, device=kernels)
    with torch.no_grad():
        pools = [pool.float() for pool in batch.pools()]
        found = paged_triton.read(batch.queries, *pools, batch.mask(), scale=batch.scale)
    assert torch.equal(found, batch.read("triton"))


# --- the same bits ----------------------------------------------------------------------------------------------


def test_a_sequence_has_the_same_bits_alone_and_among_others_and_for_any_block_size(kernels, short_splits):
    """So a text that is drawn with a seed cannot depend on what else is in the batch."""

    @settings(max_examples=8)
    @given(
        st.lists(st.integers(1, 100), min_size=2, max_size=3),
        st.sampled_from([1, 3, 16, 64]),
        st.sampled_from([torch.float32, torch.bfloat16]),
    )
    def any_lengths(lengths, block_size, dtype):
        past = tuple(length - 1 for length in lengths)
        batch = Batch(past, (1,) * len(past), block_size, 2, 1, dtype=dtype, garbage=NAN, device=kernels)
        together = batch.read("triton")
        for number in range(len(past)):
            alone = Batch(past[number : number + 1], (1,), 16, 2, 1, dtype=dtype, seed=1, spare=2, device=kernels)
            vars(alone).update(queries=batch.queries[:, :, number : number + 1], texts=[batch.texts[number]])
            assert torch.equal(alone.read("triton"), together[:, :, number : number + 1])

    any_lengths()


def test_one_stretch_alone_has_the_bits_that_it_has_beside_a_longer_sequence(kernels):
    """The first goes straight into the context, the second through `combine`."""
    both = Batch((20, 290), (1, 1), heads=2, kv_heads=1, device=kernels)
    alone = Batch((20,), (1,), heads=2, kv_heads=1, device=kernels)
    vars(alone).update(queries=both.queries[:, :, :1], texts=both.texts[:1])
    assert torch.equal(alone.read("triton"), both.read("triton")[:, :, :1])


# --- in the cache -----------------------------------------------------------------------------------------------


def test_layouts_of_queries_change_no_bit(kernels):
    batch = Batch((40, 2), (1, 1), head_dim=20, device=kernels)
    expected = batch.read("triton")
    spread = torch.full((1, 4, 2, 40), NAN, device=kernels)
    spread[..., ::2] = batch.queries
    for queries in (batch.queries.contiguous(), spread[..., ::2]):
        found = paged_triton.read(queries, *batch.pools(), batch.mask(), scale=batch.scale)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [16, 64, 128, 256])
def test_a_stretch_is_whole_tiles_of_powers_of_two(width, dtype):
    for group in (1, 3, 16, 17, 64):
        found = paged_triton.sizes(group, width, dtype)
        for size in (found["BLOCK_K"], found["GROUP_TILE"]):
            assert size >= 16
            assert size & (size - 1) == 0
        assert paged_triton.SPLIT % found["BLOCK_K"] == 0
        assert found["GROUP_TILE"] >= group


# --- the battery ------------------------------------------------------------------------------------------------

SMALL = Batch((4, 40), (1, 1), 3, 2, 2, 20, garbage=NAN, seed=3)
BATTERY = {
    "plain": SMALL,
    "grouped": replace(SMALL, heads=6, kv_heads=2),
    "several": replace(SMALL, past=(32, 75, 5), new=(1,) * 3, kv_heads=1),
    "beside_reading": replace(SMALL, past=(6, 40, 9), new=(4, 1, 1)),
    "bf16": replace(SMALL, dtype=torch.bfloat16, head_dim=64, garbage=1e4),
    "steep": None,
    "far_blocks": None,
    "far_heads": None,
}


@contextmanager
def watched(monkeypatch, mask: PagedMask):
    """While it lasts a kernel may read only the keys of the pass, and must write what it is given to write once."""
    from triton.runtime import interpreter

    watch, kernels, size = Watch(interpreter._interpreter), sys.modules[KERNELS], mask.block_size

    def look(name, programs, tensors):
        read, written = list(tensors[:6]), list(tensors[6:])
        if name == "decode":
            filled = [pool.transpose(1, 2)[blocks[at // size], at % size] for pool in read[1:3]
                      for blocks, own in zip(mask.blocks, mask.sequences, strict=True)
                      for at in range(own.mask.key_len)]  # fmt: skip
            read[1:3] = filled
            written = written[:1] if programs[2] == 1 else written[1:]
        else:
            read, written = read[:5], read[5:]
        writing = [mask.sequences[number].rows.start for number in mask.writing()]
        whole = len(written) == 1  # the context, every row of it; of the stretches, only those that a sequence has
        if whole:
            written = [written[0][:, :, row] for row in writing]
        watch.readable, watch.writable = addresses(read), addresses(written)
        watch.written = np.zeros(len(watch.writable), dtype=np.int64)
        return whole

    def watching(name):
        real = getattr(kernels, name)

        class Kernel:
            def __getitem__(self, programs):
                def launch(*given, **kinds):
                    whole = look(name, programs, [one for one in given if isinstance(one, torch.Tensor)])
                    real[programs](*given, **kinds)
                    if watch.written.max() > 1 or (whole and watch.written.min() < 1):
                        watch.refuse(f"{name} wrote a number never or more than once")

                return launch

        return Kernel()

    with monkeypatch.context() as patch:
        patch.setattr(interpreter, "_interpreter", watch)
        for name in ("decode", "combine"):
            patch.setattr(kernels, name, watching(name))
        yield watch


def far_apart(step: str, monkeypatch) -> bool:
    """Blocks or heads that lie 2**30 numbers apart: the third begins behind 2**31. Untouched memory costs nothing."""
    shape = {"block": (3, 1, 4, 16), "head": (1, 3, 4, 16)}[step]  # blocks, kv_heads, block_size, D
    strides = {"block": (2**30, 64, 16, 1), "head": (2**24, 2**30, 16, 1)}[step]
    spread = torch.empty(2**31 + 2**24, dtype=torch.float16).as_strided(shape, strides)
    near = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    spread.copy_(near)
    queries = torch.randn(1, shape[1], 1, 16, generator=torch.Generator().manual_seed(1)).half()
    mask = PagedMask([range(shape[0])], [4 * shape[0] - 1], [1], 4)
    with watched(monkeypatch, mask):
        found, expected = (paged_triton.read(queries, pool, pool, mask, scale=1.0) for pool in (spread, near))
    return torch.equal(found, expected)


def steep() -> Batch:
    """Scores that rise by hundreds from tile to tile, and fall again."""
    batch = replace(SMALL, past=(99,), new=(1,))
    height = torch.cat([torch.linspace(1, 400, 46), torch.linspace(400, 1, 54)])
    keys = height[:, None, None].expand(100, 2, 20)
    vars(batch).update(queries=torch.ones(1, 2, 1, 20), texts=[(keys, batch.texts[0][1])])
    return batch


def passes(name: str, monkeypatch) -> bool:
    """Whether the numbers are right and no access was wrong. Any other error is a mutation that is no program."""
    try:
        if name in ("far_blocks", "far_heads"):
            return far_apart(name.removeprefix("far_")[:-1], monkeypatch)
        batch = steep() if name == "steep" else BATTERY[name]
        with watched(monkeypatch, batch.mask()):
            return batch.error_over_bound(batch.read("triton")) <= 1
    except Exception as error:
        cause = error  # the interpreter wraps what is raised in a kernel, once for each function
        while cause is not None and not isinstance(cause, WrongAccessError):
            cause = cause.__cause__
        if cause is None:
            raise
        return False


@IN_THE_INTERPRETER
@pytest.mark.parametrize("name", BATTERY)
def test_the_kernel_as_it_is_passes_the_battery(name, kernels, monkeypatch, short_splits):
    assert passes(name, monkeypatch)


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new` in the function `where`, and the case of the battery must notice."""

    name: str
    case: str
    where: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.where}-{self.name}"


MUTATIONS = [
    # What is paged.
    Mutation("block_of_the_key", "plain", "decode", "+ number // BLOCK_SIZE", "+ number // BLOCK_SIZE * 0"),
    Mutation("place_in_the_block", "plain", "decode", "(number % BLOCK_SIZE)", "(number % BLOCK_SIZE * 0)"),
    Mutation("table_of_the_sequence", "plain", "decode", "sequence * most_blocks + ", ""),
    Mutation("no_block_behind_the_end", "plain", "decode",
             "mask=exists, other=0).to(tl.int64)", "mask=exists | True).to(tl.int64)"),
    Mutation("blocks_in_int64", "far_blocks", "decode", "other=0).to(tl.int64)", "other=0)"),
    Mutation("heads_in_int64", "far_heads", "decode", "tl.program_id(1).to(tl.int64)", "tl.program_id(1)"),
    # Where a sequence ends.
    Mutation("its_own_length", "several", "decode", "tl.load(lengths + sequence)", "tl.load(lengths)"),
    Mutation("the_end_of_the_stretch", "several", "decode", "tl.minimum(length, start + SPLIT)", "length"),
    Mutation("the_end_of_the_text", "several", "decode", "tl.minimum(length, start + SPLIT)", "start + SPLIT"),
    Mutation("the_last_key", "plain", "decode", "exists = number < end", "exists = number < end - 1"),
    Mutation("no_key_behind_the_last", "plain", "decode", "exists = number < end", "exists = number <= end"),
    Mutation("scores_behind_the_end", "plain", "decode", "tl.where(exists[None, :], scores, -INFINITY)", "scores"),
    Mutation("keys_behind_the_end", "plain", "load_keys", "exists[:, None] & ", ""),
    # Heads and columns.
    Mutation("heads_of_the_group_stand_together", "grouped", "decode",
             "kv_head * GROUP + member", "kv_head + member * 2"),
    Mutation("members", "grouped", "decode", "(member < GROUP)[:, None] & ", "(member < GROUP + 1)[:, None] & "),
    Mutation("columns", "plain", "decode", "(column < HEAD_DIM)[None, :]", "(column < WIDTH)[None, :]"),
    Mutation("columns", "plain", "load_keys", "(column < HEAD_DIM)[None, :]", "(column < WIDTH)[None, :]"),
    Mutation("columns", "several", "combine", "mask=column < HEAD_DIM)", "mask=column < WIDTH)"),
    Mutation("row_of_the_sequence", "beside_reading", "decode", "tl.load(rows + sequence)", "sequence"),
    Mutation("row_of_the_sequence", "beside_reading", "combine", "tl.load(rows + sequence)", "sequence"),
    Mutation("widened_for_the_interpreter", "bf16", "decode", "if WIDEN:", "if False:"),
    # The online softmax.
    Mutation("scale", "plain", "decode", '"ieee") * scale', '"ieee")'),
    Mutation("maximum_never_falls", "steep", "decode",
             "tl.maximum(running_max, tl.max(scores, 1))", "tl.max(scores, 1)"),
    Mutation("starts_at_minus_infinity", "steep", "decode",
             "tl.full([GROUP_TILE], -INFINITY", "tl.full([GROUP_TILE], 9999.0"),
    Mutation("sum_rescaled", "several", "decode", "running_sum * correction", "running_sum"),
    Mutation("accumulation_rescaled", "several", "decode", "accumulated * correction[:, None]", "accumulated"),
    Mutation("keys_before_the_stretch", "several", "decode", "range(start, end, BLOCK_K)", "range(0, end, BLOCK_K)"),
    # The stretches together.
    Mutation("kept_by_head", "several", "decode",
             "(sequence * heads + head) * splits + split", "sequence * heads * splits + head + split"),
    Mutation("only_those_it_has", "several", "combine", "tl.cdiv(tl.load(lengths + sequence), SPLIT)", "splits"),
    Mutation("all_that_it_has", "several", "combine",
             "tl.cdiv(tl.load(lengths + sequence), SPLIT)", "tl.load(lengths + sequence) // SPLIT"),
    Mutation("maximum", "steep", "combine", "new_max = tl.maximum(running_max, its_max)", "new_max = its_max"),
    Mutation("sum_rescaled", "steep", "combine", "running_sum * correction", "running_sum"),
    Mutation("weight_of_the_sum", "several", "combine", "tl.load(sums + at) * weight", "tl.load(sums + at)"),
    Mutation("accumulation_rescaled", "steep", "combine", "accumulated * correction", "accumulated"),
    Mutation("weight_of_the_result", "several", "combine", "its_result * weight", "its_result"),
]  # fmt: skip


def mutated(mutation: Mutation) -> str:
    """The text of the kernels' file after the change."""
    text = FILE.read_text(encoding="utf-8")
    (node,) = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == mutation.where]
    lines = text.splitlines(keepends=True)
    function = "".join(lines[node.lineno - 1 : node.end_lineno])
    assert function.count(mutation.old) >= 1, f"no {mutation.old!r} in {mutation.where}"
    changed = function.replace(mutation.old, mutation.new)
    return "".join(lines[: node.lineno - 1]) + changed + "".join(lines[node.end_lineno :])


@IN_THE_INTERPRETER
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities that a mutation makes
@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_without_this_guard_a_case_fails(mutation, kernels, monkeypatch, tmp_path, short_splits):
    path = tmp_path / "mutated_kernels.py"
    path.write_text(mutated(mutation), encoding="utf-8")
    module = import_kernels(path)
    monkeypatch.setitem(sys.modules, KERNELS, module)
    monkeypatch.setattr(CMHA.implementations, KERNELS.rpartition(".")[2], module, raising=False)
    assert not passes(mutation.case, monkeypatch)
