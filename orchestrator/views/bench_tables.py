"""What `python -m orchestrator attention-bench` found, as text: a table, how things grow, what it leaves out."""

from collections.abc import Sequence

from orchestrator.evaluation.attention_bench import Bench, Row
from orchestrator.evaluation.attention_call import PASSES
from orchestrator.views.bench_figures import mask_notes

CELLS = {  # of each pass: key -> heading and width; what no row has is left out
    "seconds": ("ms (quartiles)", 22),
    "over_eager": ("x eager", 18),
    "speed": ("", 24),
    "tflops": ("TFLOP/s", 8),
    "peak_bytes": ("peak MiB", 8),
}


def table(rows: Sequence[Row], bench: Bench) -> list[str]:
    """The rows as text, under two lines of headings."""
    left_out = {"speed": bench.baseline is None, "tflops": bench.device != "cuda"}
    headings = CELLS | {"speed": (f"x {bench.baseline}'s speed", 24)}
    shown = {key: of for key, of in headings.items() if not left_out.get(key)}
    width = sum(of[1] + 1 for of in shown.values()) - 1
    lines = [f"{'':26}  {' forward ':-^{width - 1}}  {' forward + backward ':-^{width - 1}}"]
    names = " ".join(f"{heading:>{columns}}" for heading, columns in shown.values())
    lines.append(f"{'implementation':18} {'T':>6} {names} {names}")
    for row in rows:
        if row.not_measured:
            lines.append(f"{row.implementation:18} {row.length:6} not measured: {row.not_measured}")
            continue
        cells = [f"{cell(row, key, name):>{of[1]}}" for name in PASSES for key, of in shown.items()]
        lines.append(" ".join([f"{row.implementation:18} {row.length:6}", *cells]))
    return lines


def cell(row: Row, key: str, name: str) -> str:
    """One value of a row, of the pass `name`, as text."""
    value = getattr(row, key)[name]
    if value is None:
        return "-"
    if isinstance(value, dict):
        return with_spread(value, 1000 if key == "seconds" else 1)
    return short(value / 2**20 if key == "peak_bytes" else value)


def with_spread(spread: dict | None, factor: float = 1) -> str:
    """Median (quartiles)."""
    if spread is None:
        return "-"
    median, low, high = (short(spread[key] * factor) for key in ("median", "lower_quartile", "upper_quartile"))
    return f"{median} ({low}-{high})"


def short(value: float) -> str:
    """Three digits or so."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def growth_lines(exponents: Sequence[dict]) -> list[str]:
    lines = []
    for found in exponents:
        name = "forward" if found["time"]["forward_backward"] is None else "forward_backward"
        time, memory = found["time"][name], found["memory"][name]
        what = f"time grows with T^{time:.1f}" + (f", memory with T^{memory:.1f}" if memory is not None else "")
        where = f"{name.replace('_', ' + ')}, T = {found['from']} to {found['to']}"
        lines.append(f"{found['implementation']}: {what} ({where})")
    return lines


def notes(rows: Sequence[Row], device: str) -> list[str]:
    """What the table leaves out and is large: slow first calls, and memory for what is made of a mask."""
    lines = []
    if device == "cpu" and any(row.implementation == "flash_triton" and not row.not_measured for row in rows):
        lines.append("flash_triton ran in Triton's interpreter: its times say nothing about a GPU.")
    for row in (row for row in rows if row.not_measured is None):
        usual = sum(spread["median"] for spread in row.seconds.values() if spread)
        if row.first_call_seconds > max(1.0, 5 * usual):
            what = "with what is compiled or loaded once"
            lines.append(f"{row.implementation} at T = {row.length}: first call {row.first_call_seconds:.1f} s, {what}")
    return lines + mask_notes([vars(row) for row in rows])
