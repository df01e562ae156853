"""The figures of the paged cache: what is drawn is what the manager's books say."""

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import same_color
from matplotlib.patches import Rectangle

from orchestrator.serving.block_manager import BlockManager, BlockTable
from orchestrator.views.page_figures import CACHED, COLOURS, MemoryUse, memory_figure, memory_use, pool_figure


def written(manager: BlockManager, prompt: list[int]) -> BlockTable:
    table = manager.open(prompt)
    manager.reserve(table, len(prompt) - len(table.tokens))
    manager.commit(table, prompt[len(table.tokens) :])
    return table


@pytest.fixture
def scene():
    """Two texts that begin alike (block 1 and 2 shared), one that has gone (block 0 can still be found)."""
    manager = BlockManager(8, 2)
    gone = written(manager, [90, 91])
    one = written(manager, [10, 11, 12, 13, 14])
    other = written(manager, [10, 11, 12, 13, 20])
    manager.release(gone)
    return manager, {"one": one, "other": other}


def texts_of(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_each_written_slot_shows_its_token_once_and_shared_blocks_their_count(scene):
    manager, tables = scene
    figure = pool_figure(manager, tables, title="A pool", words={10: "once", 20: "boy"})
    FigureCanvasAgg(figure).draw()
    pool, right = figure.axes
    texts = texts_of(pool)
    assert sorted(text for text in texts if not text.startswith(("block", "held"))) == [
        "11", "12", "13", "14", "boy", "once",
    ]  # fmt: skip
    assert texts.count("held 2 times") == 2
    assert [text for text in texts if text.startswith("block")] == [f"block {block}" for block in range(8)]
    assert "one: 5 tokens" in texts_of(right)
    numbers = [int(text) for text in texts_of(right) if text.isdigit()]
    assert numbers == [*tables["one"].blocks, *tables["other"].blocks]
    assert "4 of 8 blocks held, 2 slots in each" in pool.get_title()


def test_only_shared_blocks_are_hatched_and_only_a_findable_free_block_is_grey(scene):
    manager, tables = scene
    pool, right = pool_figure(manager, tables, title="A pool").axes
    assert sum(bool(patch.get_hatch()) for patch in pool.patches) == 2
    assert sum(bool(patch.get_hatch()) for patch in right.patches) == 4  # two shared blocks in each of two tables
    assert sum(same_color(patch.get_facecolor(), CACHED) for patch in pool.patches) == len(manager.cached_blocks) == 1


def test_the_area_in_a_sequences_colour_is_what_it_has_written(scene):
    manager, tables = scene
    pool, right = pool_figure(manager, tables, title="A pool").axes
    for colour, table in zip(COLOURS, tables.values(), strict=False):
        for axes, scale in ((pool, 1), (right, manager.block_size)):
            area = sum(
                patch.get_width() * patch.get_height() * scale
                for patch in axes.patches
                if isinstance(patch, Rectangle) and same_color(patch.get_facecolor()[:3], colour)
            )
            shared = 2.0 if axes is pool else 0.0  # two shared blocks of two slots, half of each its colour
            assert area == pytest.approx(len(table.tokens) - shared)


def test_what_nobody_could_read_is_refused():
    manager = BlockManager(65, 2)
    with pytest.raises(ValueError, match="65 blocks are too many"):
        pool_figure(manager, {}, title="")
    manager = BlockManager(16, 2)
    with pytest.raises(ValueError, match="9 tables"):
        pool_figure(manager, {str(i): manager.open([1]) for i in range(9)}, title="")


def test_memory_is_counted_as_by_hand(scene):
    manager, tables = scene
    assert memory_use(manager, list(tables.values()), 24) == MemoryUse(held=8, written=6, contiguous=48, tokens=10)
    manager.reserve(tables["one"], 4)  # two more blocks, of which nothing is written
    assert memory_use(manager, list(tables.values()), 24) == MemoryUse(held=12, written=6, contiguous=48, tokens=10)


def test_the_memory_figure_says_how_much_of_it_is_written():
    history = [MemoryUse(8, 6, 48, 10), MemoryUse(12, 9, 48, 14)]
    figure = memory_figure(history, title="Memory", pool_slots=16)
    FigureCanvasAgg(figure).draw()
    pages, regions = figure.axes
    assert "75%" in pages.get_title()
    assert "25%" in regions.get_title()
    assert list(pages.lines[0].get_ydata()) == [8, 12]
    assert list(regions.lines[0].get_ydata()) == [48, 48]
    assert pages.get_ylim() == regions.get_ylim()
