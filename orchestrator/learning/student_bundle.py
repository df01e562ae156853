"""The student bundle: the project as a zip, without the solutions of the exercises. `make student-bundle`.

    python -m orchestrator.learning.student_bundle [--out dist/student-bundle.zip]

What is in it: the files that git tracks as they are on the disk, or without git every file that is no by-product. Left
out are the solutions, and the tests that hold wrong ones. The same files give the same zip, byte for byte. (The
packages stay, and with them one way to write each formula: the exercises are for understanding, not for secrecy.)
"""

import argparse
import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from GPT2Model.files import replace_file

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = ("exercises/solutions", "tests/exercises", "tests/orchestrator/commands/test_check.py")
STUBS, OWN_CLASSES = "exercises/adapters.py", "exercises/my_gpt2.py"
BY_PRODUCTS = {"runs", "dist", "build", "__pycache__", "node_modules"}  # and whatever begins with a dot, but .ci
FOLDER = "gpt2-from-scratch"
SAME_DAY = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can hold


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Pack the project for students, without the solutions.")
    parser.add_argument("--out", default="dist/student-bundle.zip", help="the zip (default: dist/student-bundle.zip)")
    args = parser.parse_args(argv)
    try:
        out = Path(args.out)
        packed, left_out = make_bundle(ROOT, out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("left out:")
    for name in left_out:
        print(f"  {name}")
    print(f"packed: {len(packed)} files, {out.stat().st_size / 1024:,.0f} KB: {out}")
    return 0


def make_bundle(root: Path, out: Path) -> tuple[list[str], list[str]]:
    """Write the zip, beside its place first.

    Args:
        root: of the project. out: the zip.
    Returns: the names that were packed, and those that were left out.
    Raises:
        ValueError: there is nothing to pack, or the stubs hold answers.
    """
    names = files_of(root)
    packed = [name for name in names if not is_left_out(name)]
    if STUBS not in packed:
        raise ValueError(f"{STUBS} is not among the {len(names)} files of {root}: is it in git?")
    check_stubs(root)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, lambda beside: pack(beside, root, packed))
    return packed, [name for name in names if is_left_out(name)]


def pack(bundle_file: Path, root: Path, names: list[str]) -> None:
    """A zip whose bytes depend on the files alone, not on the day or the system."""
    with zipfile.ZipFile(bundle_file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as bundle:
        for name in names:
            entry = zipfile.ZipInfo(f"{FOLDER}/{name}", date_time=SAME_DAY)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system = 3  # Unix on every system, so that the rights below count and the bytes are equal
            executable = os.access(root / name, os.X_OK)
            entry.external_attr = (0o100755 if executable else 0o100644) << 16
            bundle.writestr(entry, (root / name).read_bytes())


def files_of(root: Path) -> list[str]:
    """The project's files, sorted: those that git tracks and that are there; without git, all but by-products."""
    if (root / ".git").exists():
        try:
            listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True).stdout
            names = [name for name in listed.decode().split("\0") if name]
            return sorted(name for name in names if (root / name).is_file() and not (root / name).is_symlink())
        except (OSError, subprocess.CalledProcessError):
            pass  # no git on this machine: walk
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not is_by_product(name)]
        found += [Path(folder, name).relative_to(root).as_posix() for name in files if not name.endswith(".zip")]
    return sorted(found)


def is_by_product(folder: str) -> bool:
    hidden = folder.startswith(".") and folder != ".ci"
    return hidden or folder in BY_PRODUCTS or folder.endswith(".egg-info")


def is_left_out(name: str) -> bool:
    return any(name == part or name.startswith(f"{part}/") for part in LEFT_OUT)


def check_stubs(root: Path) -> None:
    """Raise if somebody's answers would be packed.

    Raises:
        ValueError: a function of exercises/adapters.py does more than raise NotImplementedError, or there is code in
            exercises/my_gpt2.py.
    """
    filled = []
    for node in ast.parse((root / STUBS).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not is_stub(node):
            filled.append(f"{node.name} in {STUBS}")
    own = root / OWN_CLASSES
    if own.is_file() and len(ast.parse(own.read_text(encoding="utf-8")).body) > 1:
        filled.append(f"code in {OWN_CLASSES}")
    if filled:
        raise ValueError(
            f"the bundle would give answers away: {', '.join(filled)}. Move your answers elsewhere (--file of `check` "
            "takes any file), and put the stubs back: git checkout exercises."
        )


def is_stub(node: ast.AST) -> bool:
    """A docstring and `raise NotImplementedError`, and nothing else."""
    if not isinstance(node, ast.FunctionDef) or len(node.body) != 2:
        return False
    documented, last = node.body
    return (
        isinstance(documented, ast.Expr)
        and isinstance(last, ast.Raise)
        and ast.unparse(last.exc or last) == ("NotImplementedError")
    )


if __name__ == "__main__":
    raise SystemExit(main())
