"""Every kind of request that cannot be served as asked: what is against it, what is taken instead, what is said.

One row for each. Requests are data, so those of CUDA and MPS need no such machine.
"""

import types
from dataclasses import dataclass, field

import pytest
import torch

from CMHA import packages
from CMHA.choosing import AttentionSettings, attention_report, choose
from CMHA.choosing.choose import chosen_once, reasons_against
from CMHA.cmha import MultiHeadAttention
from CMHA.implementations import IMPLEMENTATIONS, flash_package
from CMHA.packages import Found
from CMHA.request import AttentionRequest

HOPPER = {"device": "cuda", "dtype": torch.bfloat16, "capability": (9, 0)}
AMPERE = HOPPER | {"capability": (8, 0)}
TURING = HOPPER | {"capability": (7, 5)}
MPS = {"device": "mps"}
NO_WEIGHTS, NAN = "never forms the attention weights", "NaN on MPS"


@dataclass(frozen=True)
class Row:
    """A request and what becomes of it."""

    asked: str
    request: dict
    codes: dict[str, list[str]]  # name -> codes, of each that was asked before the one that serves
    chosen: str
    said: tuple[str, ...] = ()  # parts of the one warning; none: nothing may be said
    installed: tuple[str, ...] = ()
    settings: dict = field(default_factory=dict)

    def __str__(self) -> str:
        what = ",".join(f"{key}={value}" for key, value in self.request.items())
        return f"{self.asked}-{what}-{'+'.join(self.installed)}".replace("torch.", "")


FA2, FA3 = "flash_attention_2", "flash_attention_3"
BOTH = ("flash_attn_2", "flash_attn_3")
ROWS = [
    # On a CPU.
    Row("sdpa", {"needs_weights": True}, {"sdpa": ["weights_wanted"]}, "eager", (NO_WEIGHTS, "ask eager")),
    Row("flash_tiled", {"needs_weights": True}, {"flash_tiled": ["weights_wanted"], "sdpa": ["weights_wanted"]},
        "eager", ("at once", "ask eager")),
    Row("auto", {"needs_weights": True}, {"sdpa": ["weights_wanted"]}, "eager"),
    Row("flash_triton", {}, {"flash_triton": ["cuda_only"]}, "sdpa", ("on a CPU in Triton's interpreter only",
        "use flash_tiled", "TRITON_INTERPRET=1")),
    Row("triton", {"dtype": torch.float64, "head_dim": 129}, {"flash_triton": ["cuda_only", "dtype", "head_dim"]},
        "sdpa", ("float64", "129", "up to 128")),
    Row("paged", {}, {"paged_attention": ["no_pages"]}, "sdpa", ("this call has none", "generate()")),
    Row("paged_attention", {"needs_grad": True}, {"paged_attention": ["training"]}, "sdpa", ("it is for generation",)),
    Row("flex", {"needs_grad": True}, {"flex_attention": ["needs_grad"]}, "sdpa", ("flex_attention cannot be used",)),
    Row("flex", {"dropout": 0.1}, {"flex_attention": ["dropout"]}, "sdpa", ("dropout",)),
    Row("flex", {"needs_weights": True}, {"flex_attention": ["weights_wanted"], "sdpa": ["weights_wanted"]}, "eager",
        ("weights",)),
    Row("fa2", {}, {FA2: ["cuda_only", "dtype", "not_installed"]}, "sdpa", ("flash_attention_2 cannot", "CUDA")),
    Row("fa3", {}, {FA3: ["cuda_only", "dtype", "not_installed"], FA2: ["cuda_only", "dtype", "not_installed"]}, "sdpa",
        ("flash_attention_3 cannot",)),
    Row("fa2", {"needs_weights": True, "dtype": torch.bfloat16},
        {FA2: ["cuda_only", "not_installed", "weights_wanted"], "sdpa": ["weights_wanted"]}, "eager", ("CUDA",)),
    # On Apple's MPS.
    Row("auto", MPS, {"sdpa": ["mps_nan"]}, "eager", (NAN, "disable_mps_fix", "--attn_implementation eager")),
    Row("sdpa", MPS, {"sdpa": ["mps_nan"]}, "eager", (NAN, "--attn_implementation eager")),
    Row("fa2", MPS, {FA2: ["cuda_only", "dtype", "not_installed"], "sdpa": ["mps_nan"]}, "eager", (NAN, "CUDA")),
    Row("flex", MPS, {"flex_attention": ["mps"], "sdpa": ["mps_nan"]}, "eager", (NAN,)),
    Row("fa2", MPS, {FA2: ["cuda_only", "dtype", "not_installed"]}, "sdpa", ("CUDA",),
        settings={"disable_mps_fix": True}),
    Row("flash_triton", MPS, {"flash_triton": ["cuda_only"], "sdpa": ["mps_nan"]}, "eager", (NAN, "not on mps")),
    # On CUDA.
    Row("auto", HOPPER, {FA3: ["not_installed"], FA2: ["not_installed"]}, "sdpa"),
    Row("fa2", AMPERE, {FA2: ["not_installed"]}, "sdpa", ("flash-attn is not installed", "pip install flash-attn")),
    Row("fa3", AMPERE, {FA3: ["capability", "not_installed"], FA2: ["not_installed"]}, "sdpa", ("Hopper",)),
    Row("fa3", AMPERE, {FA3: ["capability"]}, FA2, ("Hopper", "Using flash_attention_2 instead"), BOTH),
    Row("auto", AMPERE, {FA3: ["capability"]}, FA2, (), BOTH),
    Row("auto", HOPPER, {}, FA3, (), BOTH),
    Row("auto", HOPPER, {FA3: ["not_installed"]}, FA2, (), ("flash_attn_2",)),
    Row("auto", HOPPER | {"dropout": 0.1, "needs_grad": True}, {FA3: ["dropout"]}, FA2, (), BOTH),
    Row("fa3", HOPPER | {"dropout": 0.1}, {FA3: ["dropout"]}, FA2, ("dropout",), BOTH),
    Row("fa2", TURING, {FA2: ["capability"]}, "sdpa", ("Ampere",), BOTH),
    Row("fa2", AMPERE | {"dtype": torch.float32}, {FA2: ["dtype"]}, "sdpa", ("float32", "bf16"), BOTH),
    Row("fa2", AMPERE | {"head_dim": 320}, {FA2: ["head_dim"]}, "sdpa", ("320", "256"), BOTH),
    Row("fa2", AMPERE | {"needs_weights": True}, {FA2: ["weights_wanted"], "sdpa": ["weights_wanted"]}, "eager",
        ("weights",), BOTH),
]  # fmt: skip


@pytest.fixture
def machine(monkeypatch):
    """A machine with these packages, and no others."""

    def build(installed):
        real = packages.find

        def find(name):
            if not name.startswith("flash_attn"):
                return real(name)
            return Found("9.9", module=types.ModuleType(name)) if name in installed else Found()

        for module in (packages, flash_package, *IMPLEMENTATIONS.values()):
            if hasattr(module, "find"):
                monkeypatch.setattr(module, "find", find)

    return build


def warnings_in(messages) -> list[str]:
    return [record.getMessage() for record in messages if record.levelname == "WARNING"]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_request_that_cannot_be_served_has_these_codes_this_choice_and_this_message(row, machine, messages):
    machine(row.installed)
    settings = AttentionSettings(attn_implementation=row.asked, **row.settings)
    request = AttentionRequest(**row.request)
    before = (settings, request)
    for _ in range(3):  # said once, however often it is asked
        choice = choose(settings, request)
        chosen_once.cache_clear()
    codes = {name: sorted(reason.code for reason in reasons) for name, reasons in choice.rejected}
    assert (codes, choice.chosen) == ({name: sorted(codes) for name, codes in row.codes.items()}, row.chosen)
    assert all(reason.message and reason.remedy for _, reasons in choice.rejected for reason in reasons)
    said = warnings_in(messages)
    assert len(said) == (1 if row.said else 0)
    for part in row.said:
        assert part in said[0]
    if said:
        assert f"Using {row.chosen} instead" in said[0]
    assert (settings, request) == before


@pytest.mark.parametrize("row", [row for row in ROWS if row.asked != "auto"], ids=str)
def test_under_strict_the_same_request_raises_every_reason_of_the_named_one(row, machine, messages):
    machine(row.installed)
    settings = AttentionSettings(attn_implementation=row.asked, attn_strict=True, **row.settings)
    with pytest.raises(ValueError, match="cannot serve this request") as error:
        choose(settings, AttentionRequest(**row.request))
    name = settings.requested
    request = AttentionRequest(**row.request)
    reasons = reasons_against(name, request)
    assert sorted(reason.code for reason in reasons) == sorted(row.codes[name])
    for reason in reasons:
        assert f"{name}: {reason.message}; {reason.remedy}" in str(error.value)
    assert warnings_in(messages) == []


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_report_says_the_same_and_warns_nobody(row, machine, messages):
    machine(row.installed)
    settings = AttentionSettings(attn_implementation=row.asked, **row.settings)
    report = attention_report(settings, AttentionRequest(**row.request))
    assert report["chosen"] == row.chosen
    assert {name: sorted(codes) for name, codes in report["rejected"].items()} == {
        name: sorted(codes) for name, codes in row.codes.items()
    }
    assert messages == []


def test_every_implementation_is_asked_for_something_that_it_cannot_do():
    """No row is missing: whoever adds an implementation with a check adds its failures here."""
    from CMHA.choosing import known_names

    asked = {AttentionSettings(attn_implementation=row.asked).requested for row in ROWS}
    assert asked == set(known_names()) - {"eager"}  # nothing is in the way of the definition


@torch.no_grad()
def test_a_second_model_after_a_failed_request_is_not_affected_by_it(messages):
    cfg = {"attn_implementation": "flash_attention_2", "attn_strict": True}
    kept = dict(cfg)
    first = MultiHeadAttention(8, 8, 4, 0.0, 2, **cfg)
    x = torch.randn(1, 3, 8)
    with pytest.raises(ValueError, match="flash_attention_2 cannot serve"):
        first(x)
    second = MultiHeadAttention(8, 8, 4, 0.0, 2)
    second.load_state_dict(first.state_dict())
    assert second.choice().chosen == "sdpa"
    assert second.choice().rejected == ()
    first.set_attention({"attn_strict": False})
    assert torch.equal(first(x), second(x))
    first.set_attention("sdpa")
    assert first.choice().requested == "sdpa"
    assert cfg == kept


@pytest.mark.parametrize("strict", [False, True], ids=["lenient", "strict"])
@pytest.mark.parametrize("name", ["auto", "sdpa", "eager", "fa2", "paged"])
def test_whoever_brings_pages_has_named_what_reads_them(name, strict, messages):
    choice = choose(AttentionSettings(attn_implementation=name, attn_strict=strict), AttentionRequest(paged=True))
    assert (choice.chosen, choice.rejected) == ("paged_attention", ())
    assert messages == []
    with pytest.raises(ValueError, match="paged_attention: it is for generation"):
        choose(AttentionSettings(attn_implementation=name), AttentionRequest(paged=True, needs_grad=True))


@pytest.mark.parametrize("name", sorted(set(IMPLEMENTATIONS) - {"paged_attention"}))
def test_nothing_else_reads_pages(name):
    assert "paged" in [reason.code for reason in reasons_against(name, AttentionRequest(paged=True))]
