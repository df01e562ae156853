"""The tables of docs/variants: numbers as they were found, and no difference claimed where seeds overlap."""

import pytest

from orchestrator.views.variant_tables import block, length_table, markdown_table, span, tokens_until, verdict

MACHINE = {"cpu": "a processor", "versions": {"torch": "2.13.0"}}


def results(gpt2=(0.001, 0.002, 0.003), rope=(0.004, 0.005, 0.006)) -> dict:
    runs = [
        {"model": name, "seed": seed, "above_floor": gap, "grammatical": 90 + seed, "curve": [[100, 4.0], [2500, gap]]}
        for name, gaps in (("gpt2", gpt2), ("rope", rope))
        for seed, gap in enumerate(gaps)
    ]
    windows = [{"model": name, "seed": 0, "whole": [2.0, 9.0], "cut": [2.0, 1.25]} for name in ("gpt2", "rope")]
    costs = {"parameters": 1234567, "flops_per_token": 2000, "cache_bytes_per_token": 64}
    length = {"learned": 16, "read": 32, "bin": 16, "runs": windows}
    losses = {"seeds": [0, 1, 2], "steps": 500, "machine": MACHINE, "runs": runs, "windows": length}
    return {"losses": losses, "costs": {"gpt2": costs, "rope": costs}}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_has_the_mean_the_range_and_the_costs():
    heads, _, gpt2, rope, *rest = markdown_table(results()).splitlines()
    assert len(cells(heads)) == len(cells(gpt2)) == 7
    assert cells(gpt2) == ["GPT-2", "0.0020 (0.0010 to 0.0030)", "2", "90 to 92", "1,234,567", "2,000", "64"]
    assert cells(rope)[:2] == ["rotary positions", "0.0050 (0.0040 to 0.0060)"]
    assert rest == ["", "Times: not measured yet (`python benchmarks/variants_on_tales.py --only speed`)."]


def test_times_stand_in_a_table_of_their_own_once_they_were_measured():
    found = {
        "gpt2": {"milliseconds": 3.14159, "ratio": [1.0, 1.0, 1.0]},
        "rope": {"milliseconds": 4.0, "ratio": [1.25, 1.1, 1.4]},
    }
    tasks = {"training": found, "generation": found}
    lines = markdown_table(results() | {"speed": {"nano": tasks, "one GPT-2 layer": tasks}}).splitlines()
    assert cells(lines[-2]) == ["GPT-2"] + 4 * ["1 (3.14 ms)"]
    assert cells(lines[-1]) == ["rotary positions"] + 4 * ["1.25 (1.10 to 1.40)"]
    assert len(cells(lines[-4])) == 5


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        (
            (0.004, 0.005, 0.006),
            "Each of its seeds ends above each of GPT-2's, which chance alone does once in 10 times.",
        ),
        ((0.0001, 0.0002, 0.0003), "Each of its seeds ends below each of GPT-2's"),
        ((0.0025, 0.005, 0.006), "within the spread between seeds: this run shows no difference"),
        ((0.003, 0.5, 0.6), "3 seeds: 1 come within 0.03 nats of the floor, GPT-2 with every seed."),
        ((0.003, 0.004, 0.6), "3 seeds: 2 come within 0.03 nats"),
        ((0.0, 0.004, 0.005), "within the spread"),
    ],
)
def test_a_difference_is_claimed_only_where_the_seeds_do_not_overlap(rope, said):
    assert said in verdict(results(rope=rope), "rope")


def test_a_verdict_gives_the_difference_of_the_means():
    said = verdict(results(rope=(0.004, 0.005, 0.009)), "rope")
    assert said.startswith("rotary positions, 500 steps, 3 seeds: +0.0040 nats per token against GPT-2 in the mean.")


def test_one_seed_decides_nothing_and_an_unfinished_run_says_so():
    assert "One seed says nothing" in verdict(results(gpt2=(0.001,), rope=(0.5,)), "rope")
    made = results(rope=())
    made["losses"]["unfinished"] = True
    assert "The run is not finished" in block(made, "rotary_positions.md")
    assert "not finished" not in block(results(), "rotary_positions.md")


def test_tokens_until_the_loss_is_near_enough():
    curve = [[0, 5.0], [31_400, 0.031], [62_600, 0.03], [90_000, 0.001]]
    assert tokens_until(curve) == 63
    assert tokens_until(curve[:2]) is None
    assert span([63, 63, 63]) == "63"
    assert span([1063, 63]) == "63 to 1,063"
    assert span([63, None]) == "not by all seeds"
    assert span([None, None]) == "not reached"


def test_the_loss_by_position():
    heads, _, *rows = length_table(results()).splitlines()
    assert cells(heads) == ["positions", "0 to 15", "16 to 31"]
    assert cells(rows[0]) == ["GPT-2, read in windows of 64", "2.00", "1.25"]
    assert cells(rows[3]) == ["rotary positions, read in windows of 128", "2.00", "9.00"]


def test_a_page_has_its_own_models_and_the_machine():
    text = block(results(), "rotary_positions.md")
    assert markdown_table(results(), ("gpt2", "rope")) in text
    assert verdict(results(), "rope") in text
    assert length_table(results()) in text
    assert text.endswith("Trained on a processor, torch 2.13.0, one thread a model.\n")
