"""`python -m orchestrator check` and the student bundle, as a learner and a teacher use them."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.learning import student_bundle
from orchestrator.learning.checks.registry import EXERCISES, GROUPS

ROOT = Path(__file__).resolve().parents[3]
SOLUTIONS = ROOT / "exercises" / "solutions" / "adapters.py"
STUBS = ROOT / "exercises" / "adapters.py"


def check(*arguments, capsys) -> tuple[int, str]:
    code = main(["check", *map(str, arguments)])
    return code, capsys.readouterr().out


def answers(folder: Path, text: str) -> Path:
    """A learner's file: the given functions, and nothing else."""
    file = folder / "mine.py"
    file.write_text("import math\nimport torch\n" + text, encoding="utf-8")
    return file


# ------------------------------------------------------------------ what a learner sees


def test_the_solutions_are_all_right_and_get_all_points(capsys):
    code, printed = check("--file", SOLUTIONS, capsys=capsys)
    assert code == 0
    assert printed.count("  right: ") == len(EXERCISES)
    assert printed.splitlines()[-1] == "15 right: 100 of 100 points"
    assert [line for line in printed.splitlines() if line in GROUPS] == list(GROUPS)


def test_the_stubs_are_not_started(capsys):
    code, printed = check(capsys=capsys)
    assert code == 1
    assert printed.count("  not started") == len(EXERCISES) == 15
    assert printed.splitlines()[-1] == "15 not started: 0 of 100 points"


def test_a_group_is_its_functions_and_names_may_be_mixed(capsys):
    code, printed = check("attention", "--file", SOLUTIONS, capsys=capsys)
    assert code == 0
    shown = [line.split()[0] for line in printed.splitlines() if line.startswith("  ")]
    assert shown == ["causal_mask", "one_head", "multi_head_attention", "tiled_attention"]
    _, printed = check("one_head", "gelu", "layers", "--file", SOLUTIONS, capsys=capsys)
    shown = [line.split()[0] for line in printed.splitlines() if line.startswith("  ")]
    assert shown == ["layer_norm", "gelu", "one_head"]  # each once, in the order of the table


def test_a_wrong_answer_is_wrong_with_the_mistake_in_words(tmp_path, capsys):
    file = answers(tmp_path, "def gelu(x):\n    return torch.nn.functional.gelu(x)\n")
    code, printed = check("layers", "--file", file, capsys=capsys)
    assert code == 1
    assert "gelu                    wrong: right in 0 of 5 cases" in printed
    assert "likely mistake: this is the exact GELU, through erf" in printed
    assert "look at: notebooks/llm.ipynb, section 5" in printed
    assert "layer_norm              not started: the file has no function layer_norm." in printed
    assert printed.splitlines()[-1] == "1 wrong, 1 not started: 0 of 7 points"


def test_a_mask_of_numbers_is_told_how_to_become_one_of_true_and_false(tmp_path, capsys):
    text = "def causal_mask(query_len, key_len):\n    return torch.ones(query_len, key_len).tril(key_len - query_len)\n"
    _, printed = check("causal_mask", "--file", answers(tmp_path, text), capsys=capsys)
    assert "likely mistake: a mask is torch.bool here, True = may attend." in printed
    assert "got float32; wanted: (query_len, key_len), torch.bool" in printed
    assert "arguments" not in printed  # it has two numbers, and no dtype to follow
    file = answers(tmp_path, text.replace("query_len)\n", "query_len).bool()\n"))
    assert check("causal_mask", "--file", file, capsys=capsys)[0] == 0


def test_two_mistakes_at_once_are_both_named(tmp_path, capsys):
    text = "def layer_norm(x, weight, bias, eps):\n    x = x - x.mean(-1, keepdim=True)\n"
    text += "    return x / (x.std(-1, keepdim=True) + eps) * weight + bias\n"
    code, printed = check("layer_norm", "--file", answers(tmp_path, text), capsys=capsys)
    assert code == 1
    assert "mistake 1 of 2: the variance is divided by n - 1" in printed
    assert "mistake 2 of 2: eps is added to the standard deviation" in printed


def test_a_class_made_in_float32_still_gets_the_hint_for_its_formula(tmp_path, capsys):
    text = "class Norm(torch.nn.Module):\n    def __init__(self, n):\n        super().__init__()\n"
    text += "        self.w, self.b = (torch.nn.Parameter(torch.zeros(n)) for _ in '12')\n"
    text += "def layer_norm(x, weight, bias, eps):\n    norm = Norm(len(weight))\n"
    text += "    norm.load_state_dict({'w': weight, 'b': bias})\n    x = x - x.mean(-1, keepdim=True)\n"
    text += "    return x / torch.sqrt(x.var(-1, keepdim=True, unbiased=True) + eps) * norm.w + norm.b\n"
    _, printed = check("layer_norm", "--file", answers(tmp_path, text), capsys=capsys)
    assert "likely mistake: the variance is divided by n - 1" in printed
    file = answers(tmp_path, text.replace("unbiased=True", "unbiased=False"))
    _, printed = check("layer_norm", "--file", file, capsys=capsys)
    assert "right in 7 of 8 cases" in printed
    assert "likely mistake: right in float32, but" in printed


def test_a_wrong_key_is_told_with_the_keys_that_there_are(tmp_path, capsys):
    text = "def transformer_block(x, weights, n_heads):\n    return x + weights['norm1.weight']\n"
    _, printed = check("transformer_block", "--file", answers(tmp_path, text), capsys=capsys)
    assert "KeyError: 'norm1.weight' (mine.py, line 4)" in printed
    assert "there are: norm_1.weight, " in printed


def test_an_error_is_told_with_its_line_and_the_shapes(tmp_path, capsys):
    text = "def one_head(queries, keys, values, mask):\n    return queries + values[..., :2].sum(1)\n"
    code, printed = check("one_head", "--file", answers(tmp_path, text), capsys=capsys)
    assert code == 1
    assert "raised an error" in printed
    assert "(mine.py, line 4), in the case: 6 tokens, width 8" in " ".join(printed.split())
    assert "queries (6, 8), keys (6, 8), values (6, 8), mask (6, 6) bool" in printed
    assert "Traceback" not in printed


def test_an_unknown_mistake_shows_the_first_number_that_differs(tmp_path, capsys):
    code, printed = check("gelu", "--file", answers(tmp_path, "def gelu(x):\n    return 1.25 * x\n"), capsys=capsys)
    assert code == 1
    assert "No known mistake fits." in printed
    assert "first difference, in the case (2, 5, 16) at [0, 0, 0]: got " in " ".join(printed.split())


def test_a_function_that_calls_a_stub_waits_for_it(tmp_path, capsys):
    text = "def helper():\n    raise NotImplementedError\ndef gelu(x):\n    return helper()\n"
    code, printed = check("gelu", "--file", answers(tmp_path, text), capsys=capsys)
    assert code == 1
    assert "not started: it waits for helper, which it calls." in printed


def test_own_classes_beside_the_file_are_read_anew_each_time(tmp_path, capsys):
    file = answers(tmp_path, "def gelu(x):\n    from my_own_classes import Bend\n    return Bend()(x)\n")
    form = "import torch\nclass Bend(torch.nn.GELU):\n    def __init__(self):\n        super().__init__('{}')\n"
    for approximate, code in (("none", 1), ("tanh", 0), ("none", 1)):
        (tmp_path / "my_own_classes.py").write_text(form.format(approximate), encoding="utf-8")
        assert check("gelu", "--file", file, capsys=capsys)[0] == code


def test_the_list_shows_points_and_checks_nothing(capsys):
    code, printed = check("--list", "--file", "gone.py", capsys=capsys)
    assert code == 0
    assert all(f"  {name} " in printed for name in EXERCISES)
    assert printed.splitlines()[-1] == "100 points"


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        (["atention"], "", "did you mean 'attention'?"),
        (["--file", "gone.py"], "", "expects a Python file, got 'gone.py'"),
        (["--file", "mine.py"], "raise SystemExit\n", "mine.py:1 cannot be imported: SystemExit."),
    ],
)
def test_a_wrong_command_or_file_is_one_error_and_exit_code_2(arguments, text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(text, encoding="utf-8")
    assert main(["check", *arguments]) == 2
    first, *below = [line for line in capsys.readouterr().err.splitlines() if line]
    assert first.startswith("error: ")
    assert message in first
    assert below == [f"    {line}" for line in text.splitlines()]


BEGUN = "    return math.tanh("  # its bracket is never closed


@pytest.mark.parametrize(
    ("text", "said", "shown"),
    [
        ("import math\ndef gelu(x)\n", "mine.py:2 cannot be imported: SyntaxError: expected ':'.", ["def gelu(x)", 11]),
        (f"def gelu(x):\n{BEGUN}x\n", "mine.py:2 cannot be imported: SyntaxError: '(' was never", [f"{BEGUN}x", 20]),
        ("def gelu(x):\nreturn x\n", "mine.py:2 cannot be imported: IndentationError: expected", ["return x", 0]),
        ("x = 1\nif x:\n\ty = x / 0\n", "mine.py:3 cannot be imported: ZeroDivisionError: div", ["y = x / 0", None]),
        ("x = 1\x00\n", "mine.py cannot be imported: SyntaxError: source code string cannot contain null", None),
    ],
)
def test_an_error_in_the_file_is_told_once_with_its_line_and_a_caret(text, said, shown, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    assert main(["check", "--file", str(tmp_path / "mine.py")]) == 2
    first, *below = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {said}")
    assert "line" not in first.split(" cannot be imported")[1].replace("on line 1", "")
    line, column = shown or ("", None)
    expected = [f"    {line.strip()}"] * bool(line)
    if column is not None:  # the caret stands below the letter at which Python stopped
        expected.append("    " + " " * (column - len(line) + len(line.lstrip())) + "^")
    assert below == expected


def test_an_error_in_an_imported_file_names_that_file_and_its_line_as_it_is_now(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("import my_helper\n", encoding="utf-8")
    for text, said in (("x = 1 / 0\n", "ZeroDivisionError: division by zero."), ("x =  2 / 0\n", "ZeroDivisionError")):
        (tmp_path / "my_helper.py").write_text(text, encoding="utf-8")
        assert main(["check", "--file", str(tmp_path / "mine.py")]) == 2
        first, below = capsys.readouterr().err.splitlines()
        assert first.startswith(f"error: my_helper.py:1, which mine.py imports, cannot be imported: {said}")
        assert below == f"    {text.strip()}"


def test_the_table_of_the_exercises_page_is_the_one_of_the_registry():
    text = (ROOT / "exercises" / "README.md").read_text(encoding="utf-8")
    handouts = STUBS.read_text(encoding="utf-8")
    for exercise in EXERCISES.values():
        assert f"| {exercise.group} | `{exercise.name}` | {exercise.points} | {exercise.look} |" in text
        start = handouts.index(f"def {exercise.name}(")
        end = handouts.find("\ndef ", start)
        assert f" {exercise.points} points." in handouts[start:end]
    for group, names in GROUPS.items():
        points = sum(EXERCISES[name].points for name in names)
        assert f"--- {group}: {points} points" in handouts
    assert sum(exercise.points for exercise in EXERCISES.values()) == 100


def test_what_the_exercises_point_at_exists():
    import json
    import re

    for exercise in EXERCISES.values():
        for path in re.findall(r"[\w/]+\.(?:py|ipynb)", exercise.look):
            assert (ROOT / path).is_file(), path
        for path, numbers in re.findall(r"([\w/]+\.ipynb), sections? ([\d and]+)", exercise.look):
            cells = json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]
            text = "\n" + "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
            for number in re.findall(r"\d+", numbers):
                assert f"\n## {number}. " in text, (exercise.name, path, number)


# ------------------------------------------------------------------ what a teacher hands out


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the project, without git and without what is large."""
    copy = tmp_path / "project"
    names = ("CMHA", "TransformerBlock", "GPT2Model", "orchestrator", "exercises", "tests/exercises", "pyproject.toml")
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    (copy / "runs").mkdir()
    (copy / "runs" / "by_product.txt").write_text("1")
    return copy


def test_a_bundle_has_no_solutions_and_works(project, tmp_path):
    packed, left_out = student_bundle.make_bundle(project, tmp_path / "dist" / "bundle.zip")
    assert "exercises/adapters.py" in packed
    assert "exercises/solutions/adapters.py" in left_out
    assert "tests/exercises/wrong_solutions.py" in left_out
    assert "runs/by_product.txt" not in packed + left_out
    with zipfile.ZipFile(tmp_path / "dist" / "bundle.zip") as bundle:
        assert bundle.testzip() is None
        names = bundle.namelist()
        bundle.extractall(tmp_path / "student")
    assert not [name for name in names if "solution" in name]
    folder = tmp_path / "student" / student_bundle.FOLDER
    (folder / "mine.py").write_text(SOLUTIONS.read_text(encoding="utf-8"), encoding="utf-8")
    for file, code, last in (("mine.py", 0, "4 right: 38 of 38 points"), (None, 1, "4 not started: 0 of 38 points")):
        command = [sys.executable, "-m", "orchestrator", "check", "attention", *(["--file", file] if file else [])]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert run.returncode == code, run.stderr
        assert run.stdout.splitlines()[-1] == last


def test_the_same_files_give_the_same_bytes(project, tmp_path):
    student_bundle.make_bundle(project, tmp_path / "one.zip")
    os.utime(project / "pyproject.toml", (1e9, 1e9))  # another time on the file
    student_bundle.make_bundle(project, tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_with_git_only_what_is_tracked_is_packed(project, tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-c", "core.autocrlf=false", *arguments], cwd=project, check=True, capture_output=True)

    git("init")
    git("add", ".")
    (project / "my_secret_answers.py").write_text("1")
    packed, left_out = student_bundle.make_bundle(project, tmp_path / "bundle.zip")
    assert "exercises/adapters.py" in packed
    assert "my_secret_answers.py" not in packed + left_out


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("adapters.py", "    raise NotImplementedError\n", "    return x\n", "layer_norm in exercises/adapters.py"),
        ("my_gpt2.py", '"""\n', '"""\nanswer = 42\n', "code in exercises/my_gpt2.py"),
    ],
)
def test_answers_in_the_stubs_are_never_handed_out(file, old, new, said, project, tmp_path):
    path = project / "exercises" / file
    path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        student_bundle.make_bundle(project, tmp_path / "bundle.zip")
    assert list(tmp_path.glob("*.zip*")) == []


def test_the_command_says_what_it_left_out_and_how_large_the_zip_is(project, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(student_bundle, "ROOT", project)
    assert student_bundle.main(["--out", str(tmp_path / "bundle.zip")]) == 0
    printed = capsys.readouterr().out
    assert "  exercises/solutions/adapters.py" in printed
    assert f"{(tmp_path / 'bundle.zip').stat().st_size / 1024:,.0f} KB" in printed
