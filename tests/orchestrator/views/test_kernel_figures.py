"""The figure of the kernels' programs, held against what the kernels themselves compute, and against the mask."""

import importlib.util

import pytest
import torch
from matplotlib.colors import to_rgba

from orchestrator.views.kernel_figures import EDGE, KERNELS, NEVER, WHOLE, Step, steps_of, tiles_of_programs
from tests.triton_interpreter import DEVICE

RANGES = """
import triton
import triton.language as tl
from CMHA.implementations.flash_triton_kernels import seeing_queries, visible_keys


@triton.jit
def ranges(out, length, BY_KEYS: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0) * BLOCK
    if BY_KEYS:
        start, whole, end = seeing_queries(first, BLOCK, BLOCK, length, length, 0, True, False, False)
    else:
        start, whole, end = visible_keys(first, BLOCK, BLOCK, length, length, 0, True, False, False)
    at = out + tl.program_id(0) * 3
    tl.store(at, start)
    tl.store(at + 1, whole)
    tl.store(at + 2, end)
"""


@pytest.fixture
def ranges(tmp_path, kernels):
    """The loops' bounds as the kernels compute them: (start, whole, end) for each program."""
    (tmp_path / "ranges.py").write_text(RANGES)
    spec = importlib.util.spec_from_file_location("ranges", tmp_path / "ranges.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(kernel: str, length: int, block: int) -> list[list[int]]:
        tiles = -(-length // block)
        out = torch.full((tiles, 3), -1, dtype=torch.int32, device=DEVICE)
        module.ranges[(tiles,)](out, length, kernel == "backward_dkdv", block)
        return out.tolist()

    return run


@pytest.mark.parametrize(("length", "block"), [(360, 64), (96, 32), (33, 16)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_steps_are_those_of_the_kernels_loops(kernel, length, block, ranges):
    expected = []
    for owned, (start, whole, end) in enumerate(ranges(kernel, length, block)):
        if kernel == "backward_dkdv":
            loops = ((range(whole, end, block), False), (range(start, whole, block), True))
        else:
            loops = ((range(start, whole, block), False), (range(whole, end, block), True))
        expected += [Step(owned, at // block, edge) for loop, edge in loops for at in loop]
    assert steps_of(kernel, length, block) == expected


def test_every_tile_with_a_visible_pair_is_met_once_and_no_other():
    for kernel, (owned_is, *_) in KERNELS.items():
        met = [(s.met, s.owned) if owned_is == "keys" else (s.owned, s.met) for s in steps_of(kernel, 360, 64)]
        assert sorted(met) == [(q, k) for q in range(6) for k in range(q + 1)]  # (tile of queries, tile of keys)


def test_the_figure_numbers_each_program_s_steps_and_colours_whole_and_edge_tiles():
    figure = tiles_of_programs()
    assert len(figure.axes) == 3
    for axes, kernel in zip(figure.axes, KERNELS, strict=True):
        assert axes.get_title(loc="left").startswith(f"{kernel}:")
        numbers = sorted(int(text.get_text()) for text in axes.texts)
        assert numbers == sorted(step for count in range(1, 7) for step in range(1, count + 1))
        colours = [patch.get_facecolor() for patch in axes.patches]
        assert colours.count(to_rgba(WHOLE)) == 15
        assert colours.count(to_rgba(EDGE)) == 6
        assert colours.count(to_rgba(NEVER)) == 36  # drawn below all
    assert [text.get_text() for text in figure.axes[1].texts][:6] == ["1", "2", "3", "4", "5", "6"]
