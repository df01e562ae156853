"""The house stands as it was planned: floors, the reading path, what is generated, what is declared."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {"CMHA": 1, "TransformerBlock": 2, "GPT2Model": 3, "orchestrator": 4, "tests": 5}
# Inside CMHA the arrows run one way too.
CMHA_STOREYS = {
    **dict.fromkeys(
        ("masks", "mask_pictures", "rotary", "request", "packages", "dropout", "kv_cache", "paged_kv_cache", "tap"), 0
    ),
    **{"implementations": 1, "choosing": 2, "cmha": 3, "adaptive": 3, "transformers_masks": 1, "with_transformers": 3},
}
READING_PATH = (
    "CMHA/cmha.py",
    "CMHA/implementations/eager.py",
    "CMHA/implementations/sdpa.py",
    "TransformerBlock/transformer_block.py",
    "GPT2Model/gpt2.py",
    "orchestrator/orchestration.py",
)


def sources() -> list[Path]:
    return [path for room in list(FLOORS)[:4] for path in sorted((ROOT / room).rglob("*.py"))]


def imported_modules(path: Path) -> list[str]:
    """Every module a file imports, at its top or inside a function."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides which floor it goes to"
            found.append(node.module)
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def wrong_arrows(files: list[Path], root: Path) -> list[str]:
    """Imports that go up: to a higher floor, or to a higher storey inside CMHA."""
    wrong = []
    for path in files:
        parts = path.relative_to(root).with_suffix("").parts
        for module in imported_modules(path):
            target = module.split(".")
            if FLOORS.get(target[0], 0) > FLOORS[parts[0]]:
                wrong.append(f"{path.relative_to(root)} imports {module}")
            inside = parts[0] == target[0] == "CMHA" and len(target) > 1 and parts[1] != "__init__"
            if inside and CMHA_STOREYS[target[1]] > CMHA_STOREYS[parts[1]]:
                wrong.append(f"{path.relative_to(root)} imports {module}")
    return wrong


def test_a_file_imports_only_from_floors_below_it():
    files = sources()
    assert len(files) > 30
    assert wrong_arrows(files, ROOT) == []


def test_an_arrow_that_runs_up_would_be_seen(tmp_path):
    (tmp_path / "CMHA" / "implementations").mkdir(parents=True)
    up = tmp_path / "CMHA" / "masks.py"
    up.write_text("def late():\n    from GPT2Model.gpt2 import GPTModel\n")
    inside = tmp_path / "CMHA" / "implementations" / "eager.py"
    inside.write_text("from CMHA.choosing import choose\n")
    assert len(wrong_arrows([up], tmp_path)) >= 1
    assert len(wrong_arrows([inside], tmp_path)) >= 1


def test_the_six_files_of_the_reading_path_are_under_600_lines():
    lengths = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in READING_PATH}
    assert sum(lengths.values()) < 600, lengths
    assert lengths["CMHA/implementations/eager.py"] < 40
    assert lengths["orchestrator/orchestration.py"] < 150


@pytest.mark.parametrize("number", range(1, 7))
def test_each_file_of_the_reading_path_says_where_it_stands_and_what_comes_next(number):
    opening = ast.get_docstring(ast.parse((ROOT / READING_PATH[number - 1]).read_text(encoding="utf-8")))
    assert opening.startswith(f"Read {number} of 6.")
    if number < 6:
        following = READING_PATH[number].removeprefix("CMHA/") if number < 3 else READING_PATH[number]
        assert following in opening[opening.index("Next:") :]


def test_the_readmes_tables_are_the_ones_made_from_the_code():
    from CMHA.choosing import names
    from GPT2Model import config
    from orchestrator import cli

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert config.markdown_table() in text
    assert names.markdown_table() in text
    assert cli.markdown_reference() in text


def test_what_the_readme_and_the_docs_point_at_exists():
    import re

    documents = ["README.md", "CONTRIBUTING.md", "tests/README.md"]
    documents += [f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")]
    assert len(documents) >= 7
    for document in documents:
        text = (ROOT / document).read_text(encoding="utf-8")
        for path in re.findall(r"`([\w./-]+\.(?:py|md|txt|ipynb|toml))`", text):
            found = (ROOT / path).exists() or (ROOT / "tests" / path).exists()
            made_up = path in ("report.json", "CMHA/implementations/mine.py")
            assert found or made_up, f"{document} points at {path}"


def test_every_requirement_is_one_that_an_installer_reads():
    from packaging.requirements import Requirement

    dynamic = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["dynamic"]
    extras = dynamic["optional-dependencies"]
    files = dynamic["dependencies"]["file"] + extras["dev"]["file"]
    names = ("", "-dev", "-hub", "-train", "-transformers")
    assert files == [f"requirements{name}.txt" for name in names]
    assert extras["transformers"]["file"] == ["requirements-transformers.txt"]
    assert extras["hub"]["file"] == ["requirements-hub.txt"]
    assert extras["train"]["file"] == ["requirements-train.txt"]
    for file in files:
        lines = [line.partition(" #")[0].strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
        assert len([Requirement(line) for line in lines if line and not line.startswith("#")]) >= (
            9 if file in files[:2] else 1
        )


def test_the_python_that_the_readme_shows_runs(tmp_path, monkeypatch):
    import re

    from GPT2Model.config import from_preset
    from GPT2Model.gpt2 import GPTModel

    GPTModel(from_preset("nano", n_layers=1)).save_pretrained(tmp_path / "model")
    GPTModel(from_preset("nano", n_layers=1, vocab_size=177)).save_pretrained(tmp_path / "tales")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    for block in blocks:  # each by itself, as a reader copies it
        code = block.replace("path/to/gpt2", str(tmp_path / "model")).replace('"folder"', repr(str(tmp_path / "copy")))
        code = code.replace("runs/DATE_TIME/model", str(tmp_path / "tales"))
        exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "copy" / "model.safetensors").exists()
    assert (tmp_path / "trace.html").stat().st_size < 1_000_000


PAGES = {
    "ATTENTION_BACKENDS.md": 2,
    "FLASH_ATTENTION_GUIDE.md": 2,
    "TROUBLESHOOTING.md": 2,
    "MISTAKES.md": 1,
    "WITH_TRANSFORMERS.md": 1,
    "GENERATION.md": 2,
}


@pytest.mark.parametrize("page", PAGES)
def test_the_python_that_the_pages_show_runs(page, tmp_path, monkeypatch):
    import re

    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) >= PAGES[page]
    for block in blocks:
        exec(compile(block, page, "exec"), {})


def test_the_compatibility_table_of_the_page_is_the_one_made_from_the_checks():
    from CMHA.choosing import compatibility

    table = compatibility.markdown_table()
    assert table in (ROOT / "docs" / "ATTENTION_BACKENDS.md").read_text(encoding="utf-8")
    assert len(table.splitlines()) == 2 + 8


def test_every_command_stands_in_the_readme_and_says_what_it_does():
    from orchestrator.commands import COMMANDS

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, command in COMMANDS.items():
        assert f"`python -m orchestrator {name}" in text
        assert command.HELP
        assert len(command.__doc__.splitlines()) > 3


def test_every_package_on_disk_is_listed_for_installation():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    on_disk = {".".join(path.parent.relative_to(ROOT).parts) for path in sources() if path.name == "__init__.py"}
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in sources()}
    assert set(listed) == on_disk == folders


def test_what_the_packages_import_is_in_requirements_txt():
    import sys

    def listed(*files: str) -> set[str]:
        lines = [line for file in files for line in (ROOT / file).read_text(encoding="utf-8").splitlines() if line]
        assert all("#" in line for line in lines), "each dependency has a reason beside it"
        return {line.split(">")[0].strip() for line in lines if not line.startswith("#")}

    extras = ("requirements-hub.txt", "requirements-train.txt", "requirements-transformers.txt")
    required, extra = listed("requirements.txt"), listed(*extras)
    imported = {module.split(".")[0] for path in sources() for module in imported_modules(path)}
    foreign = imported - set(sys.stdlib_module_names) - set(FLOORS)
    from_tiktoken, named_when_missing = {"tiktoken_ext"}, {"wandb", "triton"}
    assert foreign - from_tiktoken - named_when_missing - extra <= required


def test_what_is_an_extra_is_imported_where_it_is_asked_for_and_never_at_the_top_of_a_file():
    extra = {"huggingface_hub", "pyarrow", "tensorboard", "datasets", "wandb", "triton", "transformers"}
    kernels = ("flash_triton_kernels.py", "paged_triton_kernels.py")
    asked_for_by_another_file = {f"CMHA/implementations/{name}" for name in kernels}
    for path in sources():
        if path.relative_to(ROOT).as_posix() in asked_for_by_another_file:
            continue
        at_the_top = ast.Module(ast.parse(path.read_text(encoding="utf-8")).body, [])
        names = {
            name.split(".")[0]
            for node in at_the_top.body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])
        }
        assert not names & extra, f"{path} needs {names & extra} even to be imported"


def test_every_test_that_the_list_of_mistakes_names_exists():
    import re

    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    named, current = [], None
    for file, test in re.findall(r"`([\w/]*\.py)?::(test_\w+)`", text):
        current = file or current
        named.append((current, test))
    assert len(named) > 25
    missing = [(file, test) for file, test in named if f"def {test}(" not in (ROOT / "tests" / file).read_text()]
    assert missing == []
