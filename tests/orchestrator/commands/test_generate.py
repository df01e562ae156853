"""`python -m orchestrator generate` as a user runs it: stdout, stderr, the interactive prompt, and mistakes."""

import io
import json
import os
import pty
import re
import select
import signal
import string
import subprocess
import sys

import pytest
import torch

from GPT2Model.generation import generate
from GPT2Model.gpt2 import GPTModel
from GPT2Model.sampling import Sampling
from GPT2Model.text_generation import generate_text
from orchestrator.cli import main
from orchestrator.text.tales import TalesTokenizer
from orchestrator.text.tokenizers import CharTokenizer, NamedTokenizer
from orchestrator.training.final import open_trained, save_final
from orchestrator.training.precision import native_bf16

LETTERS = CharTokenizer("".join(sorted({*string.ascii_letters, *string.digits, *";/ \n"})))
CFG = {
    "vocab_size": LETTERS.vocab_size, "context_length": 48, "emb_dim": 30, "n_heads": 5, "n_layers": 2,
    "drop_rate": 0.1, "init_std": 0.6, "tie_weights": False,
}  # fmt: skip  # large weights and a head of its own, so that the greedy text varies


def saved(folder, seed: int, tokenizer=LETTERS, **changes) -> str:
    torch.manual_seed(seed)
    save_final(GPTModel({**CFG, **changes}), tokenizer, folder / "final")
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """The folder of a run with a small model, whose weights are random."""
    return saved(tmp_path_factory.mktemp("run"), seed=1)


@pytest.fixture(scope="module")
def opened(run):
    return open_trained(run)


def written(capsys, *arguments, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of the command."""
    assert main(["generate", "--device", "cpu", *map(str, arguments)]) == code
    found = capsys.readouterr()
    return found.out, found.err


def greedy(opened, prompt: str, new: int) -> str:
    """The text of the plain loop without a cache, up to the end of text."""
    model, tokenizer = opened
    ids = torch.tensor([tokenizer.encode(prompt)])
    new = generate(model, ids, new, use_cache=False)[0, ids.shape[1] :].tolist()
    return tokenizer.decode(new[: new.index(tokenizer.end_of_text)] if tokenizer.end_of_text in new else new)


PATHS = {"plain": (), "uncached": ("--no_cache",), "eager": ("--attn_implementation", "eager"),
         "paged": ("--attn_implementation", "paged"), "auto": ("--dtype", "float32")}  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_stdout_holds_the_text_and_stderr_how_fast_it_was(path, run, opened, capsys, caplog):
    text = greedy(opened, "Hello", 30)
    assert len(set(text)) > 10  # it varies
    out, err = written(
        capsys, "--model", run, "--prompt", "Hello", "--temperature", 0, "--max_new_tokens", 30, *PATHS[path]
    )
    assert out == text + "\n"
    assert "WARNING" not in err + caplog.text  # nothing fell back
    line = err.splitlines()[-1]
    assert re.match(
        r"5 prompt tokens in \d+\.\d\d s \([\d.]+ tokens/s\); 30 new tokens, .*others in .* tokens/s\)$", line
    )


def test_each_piece_is_shown_at_once(run, opened, monkeypatch):
    class Recorded(io.StringIO):
        def flush(self):
            seen.append(self.getvalue())

    seen, text = [], greedy(opened, "Hello", 30)
    monkeypatch.setattr(sys, "stdout", Recorded())
    assert main(["generate", "--model", run, "--prompt", "Hello", "--temperature", "0", "--max_new_tokens", "30"]) == 0
    assert [text[:length] for length in range(1, 31)] == [one for one in dict.fromkeys(seen) if 0 < len(one) <= 30]


@pytest.mark.parametrize(
    "precision", [("--dtype", "bfloat16"), ("--int8",), ("--dtype", "auto"), ("--dtype", "float16")], ids=str
)
def test_other_precisions_write_too_and_slow_ones_are_named(precision, run, capsys):
    out, err = written(capsys, "--model", run, "--prompt", "Hello", "--max_new_tokens", 9, "--stop", "\n", *precision)
    assert 1 <= len(out) <= 10
    assert ("emulates bfloat16" in err) == (precision[-1] == "bfloat16" and not native_bf16("cpu"))


def test_json_is_one_object_with_everything(run, opened, capsys):
    prompts = ("--prompt", "Hello", "--prompt", "a b", "--n", 2, "--max_new_tokens", 12, "--stop", "e", "--stop", "qq")
    drawn = ("--temperature", 0.9, "--top_k", 40, "--seed", 7, "--logprobs", 2)
    out, _ = written(capsys, "--model", run, *prompts, *drawn, "--json")
    found = json.loads(out)
    expected = generate_text(
        *opened, ["Hello", "a b"], 12, Sampling(0.9, top_k=40, seed=7), n=2, logprobs=2, stop=["e", "qq"]
    )
    assert len(found["completions"]) == 4
    for index, (one, theirs) in enumerate(zip(found["completions"], expected, strict=True)):
        assert one["prompt"] == ("Hello", "a b")[index // 2]
        assert one["prompt_ids"] == theirs.prompt_ids
        assert (one["ids"], one["text"], one["finish_reason"]) == (theirs.ids, theirs.text, theirs.finish_reason)
        for noted, id, logprobs in zip(one["logprobs"], one["ids"], theirs.logprobs, strict=True):
            assert noted["id"] == id
            assert noted["token"] == LETTERS.decode([id])
            assert noted["logprob"] == pytest.approx(logprobs.logprob, abs=1e-5)
            assert {top["id"]: top["logprob"] for top in noted["top"]} == pytest.approx(logprobs.top, abs=1e-5)
    assert found["seed"] == 7
    assert (found["prompt_tokens"], found["samples"], found["prompt_tokens_read"]) == (5 + 3, 2, 2 * (5 + 3))
    for one in found["completions"]:  # a list of ids is a line
        assert f'"prompt_ids": {one["prompt_ids"]}' in out
        assert f'"ids": {one["ids"]}' in out
    assert found["new_tokens"] == sum(len(one.ids) for one in expected)


def test_several_texts_stand_under_each_other_with_headings(run, opened, capsys):
    out, _ = written(capsys, "--model", run, "--prompt", "Hello", "--prompt", "a b", "--n", 2, "--seed", 7,
                     "--max_new_tokens", 12, "--temperature", 0.9, "--logprobs", 0)  # fmt: skip
    parts = re.split(r"^--- (.*)\n", out, flags=re.MULTILINE)
    assert parts[1::2] == [f"prompt {i} of 2, sample {j} of 2" for i in (1, 2) for j in (1, 2)]
    expected = generate_text(*opened, ["Hello", "a b"], 12, Sampling(0.9, seed=7), n=2, logprobs=0)
    for part, one in zip(parts[2::2], expected, strict=True):
        assert part.startswith(one.text + "\n")
        rows = part.removeprefix(one.text + "\n").splitlines()[1:]
        assert [float(row.split()[0]) for row in rows] == [round(noted.logprob, 3) for noted in one.logprobs]


def test_the_seed_that_was_drawn_is_named_and_gives_the_same_text_again(run, capsys):
    arguments = ("--model", run, "--prompt", "Hello", "--max_new_tokens", 20)
    first, err = written(capsys, *arguments)
    seed = re.search(r"; seed (\d+)$", err.strip())[1]
    assert written(capsys, *arguments, "--seed", seed)[0] == first
    assert written(capsys, *arguments)[0] != first


def test_unless_told_it_writes_as_much_as_fits(run, opened, capsys):
    out, _ = written(capsys, "--model", run, "--prompt", "Hello", "--temperature", 0)
    assert out == greedy(opened, "Hello", 43) + "\n"  # of 48
    message = written(capsys, "--model", run, "--prompt", "a" * 48, "--temperature", 0, code=2)[1]
    assert "leave out 1 of its tokens" in message
    slid, _ = written(capsys, "--model", run, "--prompt", "a" * 48, "--past_context", "slide", "--json")
    assert len(json.loads(slid)["completions"][0]["ids"]) == 100 or '"finish_reason": "stop"' in slid


def test_a_prompt_from_a_file_and_from_stdin(run, opened, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompt.txt").write_text("one\ntwo\n", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO("three\n"))
    out, _ = written(capsys, "--model", run, "--prompt_file", tmp_path / "prompt.txt", "--prompt_file", "-",
                     "--temperature", 0, "--max_new_tokens", 8)  # fmt: skip
    assert out == "".join(
        f"--- prompt {i} of 2\n{greedy(opened, prompt, 8)}\n" for i, prompt in ((1, "one\ntwo"), (2, "three"))
    )


def test_a_draft_gives_the_same_text_and_one_with_another_tokenizer_is_refused(run, opened, tmp_path, capsys):
    arguments = ("--model", run, "--prompt", "Hello", "--temperature", 0, "--max_new_tokens", 20)
    draft = saved(tmp_path / "draft", seed=2, n_layers=1)
    assert written(capsys, *arguments, "--draft_model", draft)[0] == greedy(opened, "Hello", 20) + "\n"
    other = CharTokenizer("".join(sorted({*LETTERS.characters, "ä"} - {"z"})))  # as many characters
    foreign = saved(tmp_path / "foreign", seed=2, tokenizer=other)
    assert "another tokenizer" in written(capsys, *arguments, "--draft_model", foreign, code=2)[1]


WRONG = {
    "no model": (("--prompt", "a"), ["--model is missing: a run's folder"]),
    "no prompt": (("--model", "{run}"), ["there is no prompt"]),
    "unknown model": (("--model", "no/such/run", "--prompt", "a"), ["no/such/run"]),
    "one of two is empty": (("--model", "{run}", "--prompt", "a", "--prompt", ""), ["prompt 2 of 2 is empty"]),
    "empty prompt": (("--model", "{run}", "--prompt", ""), ["the prompt is empty", "'<|endoftext|>'"]),
    "not its characters": (("--model", "{run}", "--prompt", "ä"), ["'ä'"]),
    "no such file": (("--model", "{run}", "--prompt_file", "nowhere.txt"), ["nowhere.txt: there is no such file"]),
    "too long": (("--model", "{run}", "--prompt", "Hello", "--max_new_tokens", "44"), ["at most 43 new", "slide"]),
    "dtype": (("--model", "{run}", "--prompt", "a", "--dtype", "float23"), ["float23", "Did you mean"]),
    "device": (("--model", "{run}", "--prompt", "a", "--device", "tpu9"), ["tpu9"]),
    "attention": (("--model", "{run}", "--prompt", "a", "--attn_implementation", "saturn"), ["saturn"]),
    "interactive and json": (("--model", "x", "--interactive", "--json"), ["leave one of them out"]),
    "pages and a draft": (("--model", "x", "--prompt", "a", "--draft_model", "x", "--attn_implementation", "paged"),
                          ["leave it or --draft_model out"]),
    "a folder as a prompt": (("--model", "{run}", "--prompt_file", "{run}"), ["is a folder: name a file in it"]),
    "python's words": (("--model", "{run}", "--prompt", "Hello", "--max_new_tokens", "44"), ["--past_context slide"]),
    "one token": (("--model", "{run}", "--prompt", "a" * 48, "--max_new_tokens", "1"), ["48 tokens and 1 new one are"]),
    "one of two too long": (("--model", "{run}", "--prompt", "a", "--prompt", "a" * 50), ["prompt 2 of 2: a prompt"]),
    "folder without a model": (("--model", "{run}/..", "--prompt", "a"), ["--model takes the folder of a run"]),
    "draft_tokens alone": (("--model", "x", "--prompt", "a", "--draft_tokens", "2"), ["--draft_model"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_mistake_ends_in_a_line_that_says_what_to_do(kind, run, capsys):
    arguments, expected = WRONG[kind]
    out, err = written(capsys, *(word.format(run=run) for word in arguments), code=2)
    assert out == ""
    for part in expected:
        assert part in err
    assert "Traceback" not in err


def test_everything_wrong_with_the_options_is_said_at_once_before_a_model_is_read(capsys):
    _, err = written(
        capsys, "--max_new_tokens", "many", "--temperature", 0, "--top_k", 0, "--top_p", "x", "--min_p", 2, "--n", 3,
        "--logprobs", -1, "--repetition_penalty", 0, "--seed", -1, "--past_context", "wrap", "--stop", "",
        "--draft_tokens", 0, "--draft_model", "y", "--no_cache", code=2,
    )  # fmt: skip
    lines = [line for line in err.splitlines() if line.startswith("  - ")]
    expected = (
        "--model is missing", "there is no prompt", "max_new_tokens must be a whole number, or none, got 'many'",
        "top_p must be a number, or none, got 'x'", "top_k must be", "min_p must be",
        "repetition_penalty must be", "seed must be", "would change nothing", "n=3 asks for 3",
        "got -1.", "a character at least", "past_context must be", "draft_tokens must be 1 or more",
        "not noted while a draft", "with --no_cache",
    )  # fmt: skip
    for part in expected:
        assert any(part in line for line in lines), part
    assert len(lines) == len(expected)


def start(*arguments, **streams) -> subprocess.Popen:
    command = [sys.executable, "-m", "orchestrator", "generate", "--device", "cpu", *map(str, arguments)]
    return subprocess.Popen(
        command, **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    )


class Screen:
    """What comes out of a terminal, read up to one expected text after the other."""

    def __init__(self, terminal: int):
        self.terminal, self.unread = terminal, ""

    def until(self, expected: str) -> None:
        expected = expected.replace("\n", "\r\n")  # as a terminal ends its lines
        while expected not in self.unread:
            ready, _, _ = select.select([self.terminal], [], [], 120)
            assert ready, f"nothing more comes, and not {expected!r}: {self.unread!r}"
            self.unread += os.read(self.terminal, 4096).decode(errors="replace")  # raises when the program has ended
        self.unread = self.unread.partition(expected)[2]


def test_prompts_through_pipes_are_answered_one_after_the_other_whatever_is_wrong_with_some(run, opened):
    lines = ["Hello", "äh", "/set temperature 0", "/set max_new_tokens 10", "", "Hello", "/set top_k 3",
             "/set colour red", "/jump", "/set n 2", "/show", "a b", "/set temperature 1", "/set n 2", "//b", "/quit",
             "never read"]  # fmt: skip
    process = start("--model", run, "--interactive", "--max_new_tokens", 6, "--seed", 1, "--prompt", "first")
    out, err = process.communicate("\n".join(lines).encode(), timeout=300)
    out, err = out.decode(), err.decode()
    assert process.returncode == 0
    sampled = [
        generate_text(*opened, prompt, 6, Sampling(0.8, seed=seed))[0].text
        for seed, prompt in enumerate(("first", "Hello"), 1)
    ]  # the seed counts on
    likeliest = [greedy(opened, prompt, 10) for prompt in ("Hello", "a b")]
    two = [one.text for one in generate_text(*opened, "/b", 10, Sampling(1.0, seed=5), n=2)]
    headed = [f"--- sample {number} of 2\n{text}" for number, text in enumerate(two, 1)]
    assert out == "".join(f"{text}\n" for text in sampled + likeliest + headed)
    for part in ("'ä'", "temperature = 0.0", "top_k would change nothing", "no setting 'colour'",
                 "'/jump' is no command", "n=2 asks for 2", "top_k = none", "max_new_tokens = 10"):  # fmt: skip
        assert part in err, part
    assert err.count("new tokens") == 5
    assert re.findall(r"; seed (\d+)", err) == ["1", "2", "5"]
    assert "Traceback" not in err


def test_a_seed_that_is_set_anew_begins_again(run, opened, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nHello\n/set seed 4\nHello\n/set top_k 0\nHello" + "a" * 50))
    out, err = written(capsys, "--model", run, "--interactive", "--seed", 4, "--max_new_tokens", 9)
    texts = [generate_text(*opened, "Hello", 9, Sampling(0.8, seed=seed))[0].text for seed in (4, 5, 4)]
    assert out == "".join(f"{text}\n" for text in texts)
    assert "or none, got 0" in err
    assert "/set past_context slide" in err


TALES = NamedTokenizer(
    "tales", TalesTokenizer(), [TalesTokenizer().decode([i]) for i in range(TalesTokenizer().vocab_size)]
)


@pytest.fixture(scope="module")
def tales_run(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("tales"), seed=1, tokenizer=TALES, vocab_size=TALES.vocab_size)


def test_a_story_of_the_tales_begins_behind_the_mark(tales_run, capsys, monkeypatch):
    asked = ("--model", tales_run, "--temperature", 1, "--seed", 3, "--max_new_tokens", 8)
    start, prompt = TALES.end_of_text, TALES.encode("One morning")

    def texts(*ids) -> list[str]:
        return [generate_text(*open_trained(tales_run), list(one), 8, Sampling(1.0, seed=3))[0].text for one in ids]

    with_mark, without = texts([start, *prompt], prompt)
    assert with_mark != without
    for given in ("One morning", "<|endoftext|>One morning"):
        found = json.loads(written(capsys, *asked, "--prompt", given, "--json")[0])["completions"][0]
        assert (found["prompt"], found["prompt_ids"], found["text"]) == (given, [start, *prompt], with_mark)
    assert written(capsys, *asked, "--prompt", "One morning", "--no_start_mark")[0] == without + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("One morning\n"))
    assert written(capsys, *asked, "--interactive")[0] == with_mark + "\n"


def test_what_a_draft_s_guesses_were_worth_is_said_also_where_a_stop_string_ends_the_text(run, opened, capsys):
    text = greedy(opened, "Hello", 20)
    arguments = ("--model", run, "--prompt", "Hello", "--temperature", 0, "--max_new_tokens", 20, "--draft_model", run)
    out, err = written(capsys, *arguments, "--stop", text[6])
    assert out == text[: text.index(text[6])] + "\n"
    assert re.search(r"; \d+ guesses, \d+ kept \(100% of those judged\), in \d pass(es)?$", err.strip())
    draft = json.loads(written(capsys, *arguments, "--json")[0])["draft"]
    assert draft == {"guessed": 16, "kept": 16, "passes": 4, "acceptance_rate": 1.0}  # 4 and one more a pass


@pytest.mark.parametrize("path", ["auto", "eager", "paged_attention"])
def test_one_line_says_how_attention_is_computed_and_names_what_is_used(path, run, capsys, caplog):
    draft = () if path == "paged_attention" else ("--draft_model", run)
    with caplog.at_level("INFO", logger="CMHA"):
        written(
            capsys, "--model", run, "--prompt", "Hello", "--max_new_tokens", 3, "--attn_implementation", path, *draft
        )
    (said,) = [record.getMessage() for record in caplog.records if record.name == "CMHA"]
    assert said.startswith(f"Attention backend: {'sdpa' if path == 'auto' else path} (")


def test_short_names_of_dtypes_are_taken_too(run, capsys):
    short, long = (written(capsys, "--model", run, "--prompt", "Hello", "--seed", 1, "--max_new_tokens", 9, "--dtype",
                           name)[0] for name in ("bf16", "bfloat16"))  # fmt: skip
    assert short == long


def test_ctrl_c_while_nothing_is_written_says_how_to_end_and_goes_on(run, opened, capsys, monkeypatch):
    class Keyboard(io.StringIO):
        """The second line is Ctrl-C."""

        def readline(self, *size):
            line = super().readline(*size)
            if line == "^C\n":
                raise KeyboardInterrupt
            return line

    monkeypatch.setattr(sys, "stdin", Keyboard("Hello\n^C\na b\n"))
    out, err = written(capsys, "--model", run, "--interactive", "--temperature", 0, "--max_new_tokens", 5)
    assert out == f"{greedy(opened, 'Hello', 5)}\n\n{greedy(opened, 'a b', 5)}\n"
    assert err.count("/quit or Ctrl-D ends") == 1


def test_in_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_ends_the_program(run, opened):
    """The answer would not end by itself: the window slides, and no token stops it."""
    terminal, inside = pty.openpty()
    endless = ("--max_new_tokens", 10**9, "--past_context", "slide", "--temperature", 0)
    process = start("--model", run, "--interactive", *endless, stdin=inside, stdout=inside, stderr=inside)
    os.close(inside)
    screen = Screen(terminal)
    try:
        screen.until("> ")
        os.write(terminal, b"Hello\n")
        screen.until(greedy(opened, "Hello", 20))
        process.send_signal(signal.SIGINT)
        screen.until("stopped")
        os.write(terminal, b"/set max_new_tokens 5\n")
        screen.until("max_new_tokens = 5")
        os.write(terminal, b"a b\n")
        screen.until(greedy(opened, "a b", 5))
        screen.until("5 new tokens")
        screen.until("> ")
        os.write(terminal, b"\x04")
        assert process.wait(timeout=300) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
