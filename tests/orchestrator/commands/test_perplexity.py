"""`python -m orchestrator perplexity` as a user runs it: the figures, what they mean, the files, what is refused."""

import json
import math
import re

import pytest
import torch

from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from orchestrator.cli import main
from orchestrator.evaluation.perplexity import perplexity
from orchestrator.text.tales import TalesTokenizer, stories
from orchestrator.training.final import save_final


class Words(TalesTokenizer):
    name = "tales"
    vocabulary = tuple(TalesTokenizer().decode([i]) for i in range(TalesTokenizer().vocab_size))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """What a run leaves: a model of the tales' vocabulary, its weights perturbed, and its tokenizer."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = GPTModel(from_preset("nano", n_layers=1, vocab_size=Words().vocab_size, context_length=32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    save_final(model.eval(), Words(), folder / "final")
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "stories.txt"
    file.write_text("<|endoftext|>".join(stories(3, seed=1)), encoding="utf-8")
    return file


def figures(printed: str) -> dict[tuple[str, int], list[str]]:
    """(precision, stride) -> the row's other columns."""
    pattern = re.compile(r"^(float32|bfloat16|float16|int8 weights, \w+) +(\d+) +(.*)$", re.M)
    return {(name, int(stride)): rest.split() for name, stride, rest in pattern.findall(printed)}


def test_it_prints_the_figure_of_the_text_and_says_what_it_means(run_folder, text_file, capsys):
    assert main(["perplexity", "--model", str(run_folder), "--text", str(text_file), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    ids = Words().encode(text_file.read_text(encoding="utf-8"))
    found = perplexity(GPTModel.from_pretrained(run_folder / "final"), ids)
    row = figures(printed)["float32", 32]
    assert row[:3] == ["1", f"{found.nats_per_token:.6f}", f"{found.perplexity:.4f}"]
    assert f"{found.predicted:,} of {len(ids):,} tokens" in printed
    for said in (
        "exp of nats/token, the mean negative log-likelihood in nats of the predicted tokens",
        "Not predicted: the first token of the text; and with stride 32",
        "cannot be compared between tokenizers",
    ):
        assert said in printed
    assert "transformers" not in printed  # side by side, both ways give one figure
    size = len(text_file.read_bytes()) - 2 * len("<|endoftext|>")
    assert f"{size:,} bytes" in printed
    assert float(row[3]) == pytest.approx(math.log2(found.perplexity) * len(ids) / size, abs=1e-4)


def test_several_strides_show_what_context_is_worth_and_costs(run_folder, text_file, tmp_path, capsys):
    arguments = ["--stride", "4", "32", "16", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["perplexity", "--model", str(run_folder), "--text", str(text_file), *arguments]) == 0
    printed = capsys.readouterr().out
    rows = figures(printed)
    assert [stride for _, stride in rows] == [4, 16, 32]
    assert [row[0] for row in rows.values()] == ["28", "16", "1"]
    assert "The loop on transformers' page prints" in printed
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    read = [row["tokens_read"] for row in report["rows"]]
    assert read == sorted(read, reverse=True)
    assert read[0] > 5 * read[-1]
    for row in report["rows"]:
        assert row["perplexity"] == pytest.approx(math.exp(row["nats"] / row["predicted"]))
    assert report["definition"][0].startswith("perplexity: exp of nats/token")
    assert report["machine"]["versions"]["torch"]
    assert (tmp_path / "out" / "perplexity.png").read_bytes().startswith(b"\x89PNG")


def test_strides_may_be_given_one_by_one_and_the_footnotes_name_only_those(run_folder, text_file, capsys):
    arguments = [
        "--stride",
        "4",
        "--stride",
        "16",
        "--attn_implementation",
        "eager",
        "--dtype",
        "bf16",
        "--device",
        "cpu",
    ]
    assert main(["perplexity", "--model", str(run_folder), "--text", str(text_file), *arguments]) == 0
    printed = capsys.readouterr().out
    assert [*figures(printed)] == [(name, stride) for name in ("float32", "bfloat16") for stride in (4, 16)]
    assert "stride 32" not in printed
    one = ["--documents", "--limit", "20"]
    assert main(["perplexity", "--model", str(run_folder), "--text", str(text_file), *one]) == 0
    assert "1 document, each" in capsys.readouterr().out


def test_int8_and_bfloat16_are_held_against_float32(run_folder, text_file, tmp_path, capsys):
    arguments = ["--int8", "--dtype", "bfloat16", "--out", str(tmp_path), "--device", "cpu"]
    assert main(["perplexity", "--model", str(run_folder), "--text", str(text_file), *arguments]) == 0
    rows = figures(capsys.readouterr().out)
    assert [name for name, _ in rows] == ["float32", "bfloat16", "int8 weights, bfloat16"]
    report = json.loads((tmp_path / "report.json").read_text())["rows"]
    for row, shown in zip(report[1:], list(rows.values())[1:], strict=True):
        change = 100 * (row["perplexity"] / report[0]["perplexity"] - 1)
        assert 1e-9 < abs(change) < 2
        assert float(shown[3]) == pytest.approx(change, abs=5.1e-4)
    assert report[0]["weight_bytes"] > report[1]["weight_bytes"] > report[2]["weight_bytes"]


def test_only_leaves_the_comparison_out(run_folder, text_file, capsys):
    asked = ["perplexity", "--model", str(run_folder), "--text", str(text_file), "--limit", "40", "--int8", "--only"]
    assert main(asked) == 0
    assert [name for name, _ in figures(capsys.readouterr().out)] == ["int8 weights, float32"]


def test_int8_is_rounded_from_the_stored_weights_not_from_bfloat16(run_folder, text_file, tmp_path):
    """The same figure whether bfloat16 was measured before or not."""
    asked = ["perplexity", "--model", str(run_folder), "--text", str(text_file), "--int8", "--dtype", "bfloat16"]
    found = []
    for i, more in enumerate(([], ["--only"])):
        assert main([*asked, *more, "--out", str(tmp_path / str(i))]) == 0
        found.append(json.loads((tmp_path / str(i) / "report.json").read_text())["rows"][-1]["nats"])
    assert found[0] == found[1]


def test_documents_are_read_apart_and_a_limit_counts_tokens(run_folder, text_file, capsys):
    asked = ["perplexity", "--model", str(run_folder), "--text", str(text_file), "--stride", "8", "--documents"]
    assert main(asked) == 0
    printed = capsys.readouterr().out
    end, texts = Words().end_of_text, text_file.read_text(encoding="utf-8").split("<|endoftext|>")
    rows = [[end, *Words().encode(text), end] for text in texts]
    model = GPTModel.from_pretrained(run_folder / "final")
    alone = [perplexity(model, row, stride=8) for row in rows]
    mean = math.fsum(one.nats for one in alone) / sum(one.predicted for one in alone)
    assert figures(printed)["float32", 8][1] == f"{mean:.6f}"
    assert "3 documents, each read by itself" in printed
    assert "the mark that opens each document" in printed
    assert main([*asked, "--limit", str(len(rows[0]) + 1)]) == 0  # of the second one token is left: nothing to predict
    assert f"{len(rows[0]) - 1} of {len(rows[0])} tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ([], ["--model is needed", "--text is needed"]),
        (["--stride", "0", "--batch_size", "x", "--dtype", "int4"], ["--stride must", "--batch_size must", "int4"]),
        (["--device", "cuda:77"], ["cannot be used here"]),
        (["--attn_implementation", "sdap"], ["Did you mean 'sdpa'"]),
        (["--stride", "64,128"], ["--stride 64 128"]),
        (["--attn_implementation", "paged"], ["--attn_implementation paged is for writing"]),
        (["--out", "/dev/null/x"], ["is not a folder that can be written"]),
    ],
)
def test_wrong_arguments_are_all_named_before_any_work(arguments, messages, capsys):
    assert main(["perplexity", *arguments]) == 2
    said = capsys.readouterr().err
    for message in messages:
        assert message in said


@pytest.mark.parametrize(
    ("written", "arguments", "message"),
    [
        ("", [], "is empty: there is nothing to measure"),
        ("One", [], "the text has 1 token"),
        ("One morning a", ["--stride", "33"], "stride 33 is more than the 32 tokens of a window"),
        ("One morning a", ["--max_length", "33"], "max_length must be from 2 to the model's context_length, 32"),
        ("Xyzzy plugh", [], "Xyzzy"),
    ],
)
def test_a_text_or_window_that_does_not_fit_the_model_is_refused(
    run_folder, written, arguments, message, tmp_path, capsys
):
    file = tmp_path / "text.txt"
    file.write_text(written, encoding="utf-8")
    assert main(["perplexity", "--model", str(run_folder), "--text", str(file), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_model_or_text_that_is_not_there_is_named(run_folder, text_file, tmp_path, capsys):
    assert main(["perplexity", "--model", str(tmp_path / "gone"), "--text", str(text_file)]) == 2
    assert "gone" in capsys.readouterr().err
    assert main(["perplexity", "--model", str(run_folder), "--text", str(tmp_path / "gone.txt")]) == 2
    assert "gone.txt" in capsys.readouterr().err
