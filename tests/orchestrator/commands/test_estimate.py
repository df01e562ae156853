"""`python -m orchestrator estimate` as a user runs it: the page, the JSON, and what is said of a wrong argument."""

import argparse
import json
import re

import pytest

from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from orchestrator.commands import estimate
from orchestrator.evaluation import estimates
from orchestrator.evaluation.training_memory import training_peak
from orchestrator.evaluation.training_step import TrainingStep
from orchestrator.training import mfu


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    estimate.add_arguments(parser)
    return estimate.run(parser.parse_args(arguments))


def facts(capsys, *arguments: str) -> dict:
    assert run("--json", *arguments) == 0
    return json.loads(capsys.readouterr().out)


XL = ("--model", "gpt2-xl", "--batch_size", "8", "--max_length", "1024", "--dtype", "bf16", "--device", "A100")


def test_the_page_has_each_number_with_its_formula_and_unit(capsys):
    assert run(*XL, "--tokens_per_second", "10000") == 0
    page = capsys.readouterr().out
    cfg = from_preset("gpt2-xl")
    rows = dict(re.findall(r"^  (\S.*?)  +(\S.*?)(?:   .*)?$", page, flags=re.MULTILINE))
    assert rows["all"] == "1,557,611,200"
    assert rows["position embeddings"] == f"{1024 * 1600:,}"
    forward = estimates.forward_flops(cfg, 8, 1024) / (8 * 1024)
    assert rows["a token, forward"] == f"{forward / 1e9:.4g} GFLOP"
    # dropout, which the preset has, keeps masks: training from fresh weights goes without
    peak = training_peak(TrainingStep(cfg | {"drop_rate": 0.0}, 8, 1024, "bf16", device="cuda"))
    assert cfg["drop_rate"] > 0
    assert "dropout 0.0" in page
    assert rows["peak"] == f"{peak.bytes / 2**30:.2f} GiB"
    assert f"the worst moment ({peak.name})" in page
    figure = mfu.mfu(cfg, 1024, 10_000, mfu.peak_flops("A100", "bf16"))
    assert rows["MFU at 10,000 tokens/s"] == f"{figure:.1%}"
    explained = mfu.explain(cfg, 1024, mfu.peak_flops("A100", "bf16"))
    assert " ".join(page.split()).endswith(explained)
    assert max(map(len, page.splitlines())) <= 130


def test_the_formula_of_the_flops_is_the_one_that_is_computed(capsys):
    run("--model", "gpt2", "--device", "T4", "--max_length", "200")
    formula = re.search(r"a token, forward .*?FLOP   (.*)", capsys.readouterr().out)[1]
    letters = {"L": 12, "C": 768, "K": 768, "F": 3072, "T": 200, "V": 50257}
    product = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula)
    assert eval(product, {}, letters) * 200 == estimates.forward_flops(from_preset("gpt2"), 1, 200)


VARIANTS = ("--norm", "rmsnorm", "--mlp", "swiglu", "--positions", "rope", "--n_kv_heads", "4")


def test_the_variants_can_be_asked_for_and_every_formula_is_theirs(capsys):
    run("--model", "gpt2", "--device", "T4", "--max_length", "200", *VARIANTS)
    page = capsys.readouterr().out
    assert "not as in GPT-2: norm rmsnorm, mlp swiglu, positions rope" in page
    assert max(map(len, page.splitlines())) <= 130
    cfg = from_preset("gpt2", norm="rmsnorm", mlp="swiglu", positions="rope", n_kv_heads=4)
    rows = {what: (number, formula) for what, number, formula in re.findall(
        r"^  (\S.*?)  +(\S.*?)   (\S.*)$", page, flags=re.MULTILINE)}  # fmt: skip
    letters = {"L": 12, "C": 768, "K": 256, "F": 2048, "T": 200, "V": 50257}
    letters["biases"] = 768 + 2 * 256 + 768  # of queries, keys, values; of the projection

    def value_of(what: str) -> int:
        return eval(re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", rows[what][1].partition(";")[0]), {}, letters)

    parameters = GPTModel(cfg).num_parameters()
    assert rows["all"][0] == rows["without position embeddings"][0] == f"{parameters:,}"
    assert value_of("all") == parameters
    assert rows["position embeddings"] == ("0", "none with rope")
    assert value_of("a token, forward") * 200 == estimates.forward_flops(cfg, 1, 200)
    assert "without position embeddings, L" not in " ".join(page.split())
    found = facts(capsys, "--model", "gpt2", "--device", "T4", "--max_length", "200", *VARIANTS)
    assert found["kv_cache"] == 2 * 4 * 12 * 8 * 200 * 256
    assert "feed-forward: gate, SiLU, up, product" in found["block_activations"]


@pytest.mark.parametrize("only", [(), VARIANTS[:2], VARIANTS[2:4], VARIANTS[4:6], VARIANTS[6:]], ids=str)
def test_of_each_variant_alone_the_page_says_what_the_model_has(only, capsys):
    run("--model", "nano", "--device", "T4", *only)
    page = capsys.readouterr().out
    cfg = from_preset("nano", **{key.removeprefix("--"): int(value) if value.isdigit() else value
                                 for key, value in zip(only[::2], only[1::2], strict=True)})  # fmt: skip
    number, formula = re.search(r"^  all  +(\S+)   (.*)$", page, flags=re.MULTILINE).groups()
    C, F, K = estimates.widths(cfg)
    letters = {"L": 2, "C": C, "K": K, "F": F, "V": 50257, "P": 128}
    letters["biases"] = C + 2 * K + C + (0 if cfg["mlp"] == "swiglu" else F + C)
    assert eval(re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula), {}, letters) == GPTModel(cfg).num_parameters()
    assert number == f"{GPTModel(cfg).num_parameters():,}"
    assert ("not as in GPT-2" in page) == (only not in ((), VARIANTS[6:]))  # shared heads are said with K


def test_json_has_all_of_it_and_nothing_else(capsys, tmp_path):
    found = facts(capsys, *XL, "--out", str(tmp_path), "--gradient_accumulation_steps", "4")
    assert found == json.loads((tmp_path / "estimate.json").read_text())
    assert found["parameters"]["total"] == 1_557_611_200
    assert found["tokens_per_step"] == 4 * 8 * 1024
    assert found["flops_per_step"]["training"] == 4 * 3 * estimates.forward_flops(from_preset("gpt2-xl"), 8, 1024)
    assert sum(found["training_peak"]["parts"].values()) == found["training_peak"]["bytes"]
    assert found["training_peak"]["bytes"] == max(found["moments"].values())
    assert found["training_peak"]["parts"]["gradients"] == 4 * 1_557_611_200  # of the passes before
    forward = estimates.forward_peak(from_preset("gpt2-xl"), 8, 1024, short=True)
    assert (found["forward_peak"]["moment"], found["forward_peak"]["bytes"]) == (forward["moment"], forward["bytes"])
    assert found["kv_cache"] == 2 * 4 * 48 * 8 * 1024 * 1600
    assert found["mfu"] is None
    speed = found["tokens_per_second_at"]["0.4"]
    with_speed = facts(capsys, *XL, "--tokens_per_second", str(speed))
    assert with_speed["mfu"] == pytest.approx(0.4)


def test_options_mean_what_they_mean_in_training(capsys):
    cpu = ("--model", "nano", "--batch_size", "4", "--device", "cpu", "--dtype", "fp32", "--drop_rate", "0.1")
    plain = facts(capsys, *cpu, "--peak_tflops", "1")
    step = TrainingStep(from_preset("nano", drop_rate=0.1), 4, 128)
    assert plain["training_peak"]["bytes"] == training_peak(step).bytes
    assert plain["peak"] == {"flops": 1e12, "name": "cpu, fp32", "source": "--peak_tflops"}
    saved = facts(
        capsys,
        *cpu,
        "--peak_tflops",
        "1",
        "--activation_checkpointing",
        "--loss_chunk_tokens",
        "64",
        "--optimizer",
        "muon",
    )
    assert (saved["step"]["activation_checkpointing"], saved["step"]["loss_chunk_tokens"]) == (True, 64)
    assert saved["training_peak"]["bytes"] < plain["training_peak"]["bytes"]
    assert saved["training_peak"]["parts"]["optimizer"] < plain["training_peak"]["parts"]["optimizer"]
    eager = facts(capsys, *cpu, "--peak_tflops", "1", "--attn_implementation", "manual")
    assert eager["step"]["attention"] == "eager"
    smaller = facts(capsys, *cpu, "--peak_tflops", "1", "--max_length", "32", "--n_layers", "1", "--vocab_size", "99")
    assert smaller["parameters"]["total"] == estimates.count_parameters(
        from_preset("nano", context_length=32, n_layers=1, vocab_size=99)
    )


def test_what_cannot_run_on_a_cpu_is_estimated_as_what_takes_its_place(capsys):
    arguments = ("--model", "nano", "--device", "cpu", "--peak_tflops", "1", "--attn_implementation")
    found = facts(capsys, *arguments, "flash_attention_2")
    assert found["step"]["attention"] == "sdpa"
    assert "CUDA" in found["attention"]
    on_gpu = facts(capsys, "--model", "nano", "--device", "A100", "--attn_implementation", "fa2")
    assert on_gpu["step"]["attention"] == "flash_attention_2"


def test_without_a_device_the_peak_is_measured_here(capsys):
    found = facts(capsys, "--model", "nano", "--dtype", "fp32", "--device", "cpu")
    assert found["peak"]["name"].startswith("measured here: ")


def test_a_folder_with_weights_is_a_model(capsys, tmp_path):
    model = GPTModel(from_preset("nano", n_layers=1, vocab_size=99))
    model.save_pretrained(tmp_path)
    found = facts(capsys, "--model", str(tmp_path), "--device", "T4")
    assert found["parameters"]["total"] == model.num_parameters()
    with pytest.raises(ValueError, match="is a folder with weights: n_layers, norm are theirs"):
        run("--model", str(tmp_path), "--n_layers", "2", "--norm", "rmsnorm")


def test_all_wrong_numbers_are_said_at_once():
    with pytest.raises(ValueError, match="these arguments are wrong") as refused:
        run(
            "--batch_size",
            "0",
            "--max_length",
            "x",
            "--drop_rate",
            "1",
            "--dtype",
            "int8",
            "--tokens_per_second",
            "-1",
            "--norm",
            "batchnorm",
            "--positions",
            "alibi",
            "--mlp",
            "relu",
            "--n_kv_heads",
            "half",
        )
    for reason in (
        "--batch_size must be a whole number, 1 or more, got '0'",
        "--max_length must be a whole number, 1 or more, got 'x'",
        "--drop_rate must be a number, 0 or more and below 1, got '1'",
        "--dtype must be one of auto, fp32, bf16, fp16, got 'int8'",
        "--tokens_per_second must be a number, 0 or more, got '-1'",
        "--norm must be layernorm or rmsnorm, got 'batchnorm'",
        "--mlp must be gelu or gelu_exact or swiglu, got 'relu'",
        "--positions must be learned or rope, got 'alibi'",
        "--n_kv_heads must be a whole number, 1 or more, got 'half'",
    ):
        assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "gpt3"), "unknown preset 'gpt3'. Did you mean 'gpt2'"),
        (("--device", "K80"), "the peak of 'K80' .*--peak_tflops"),
        (("--device", "T4", "--dtype", "bf16"), "the peak of 'T4' in bf16 is not known"),
        (("--device", "T4", "--attn_implementation", "paged_attention"), "it is for generation.*for training"),
        (("--device", "T4", "--attn_implementation", "eagre"), "Did you mean 'eager'"),
        (("--device", "T4", "--emb_dim", "100"), "n_heads.* must divide"),
        (("--device", "T4", "--optimizer", "sgd"), "--optimizer must be one of adamw, muon, none"),
    ],
)
def test_a_wrong_name_is_answered_with_what_there_is(arguments, said):
    with pytest.raises(ValueError, match=said):
        run(*arguments)


def test_a_chip_that_no_table_has_is_served_with_a_peak_of_ones_own(capsys):
    found = facts(capsys, "--model", "nano", "--device", "K80", "--peak_tflops", "8.7", "--dtype", "fp32")
    assert found["peak"]["flops"] == pytest.approx(8.7e12)
    assert found["step"]["device"] == "cuda"
    for name in ("K80", "cuda", "mps"):  # --dtype auto, of what is not here
        assert facts(capsys, "--model", "nano", "--device", name, "--peak_tflops", "8.7")["step"]["dtype"] != "auto"
