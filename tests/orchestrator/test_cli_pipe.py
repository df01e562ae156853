"""`python -m orchestrator ... | head`: when nobody reads on, the program ends, and says nothing of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
START = [sys.executable, "-m", "orchestrator"]
BROKEN = """
import sys
from orchestrator import cli
cli.COMMANDS["doctor"].run = lambda args: [][1]
sys.exit(cli.main(["doctor"]))
"""


def without_a_reader(command, **environment) -> subprocess.CompletedProcess:
    """Run a command whose stdout is a real pipe with its other end closed, as it is once `head` has ended."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return subprocess.run(
            command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )  # fmt: skip
    finally:
        os.close(writing)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["doctor"],  # printed at once
        ["mistakes", "--list"],
        ["check", "gelu", "--file", "exercises/adapters.py"],  # flushed line by line
        ["--help"],  # argparse ends the program itself
    ],
)
def test_when_nobody_reads_on_it_ends_with_the_shells_code_and_without_a_word(arguments, unbuffered):
    done = without_a_reader([*START, *arguments], PYTHONUNBUFFERED=unbuffered)
    assert done.stderr == ""
    assert done.returncode == (0 if arguments == ["--help"] and unbuffered else 141)  # argparse overlooks it


def test_the_first_lines_reach_the_one_who_reads_them():
    first = "import sys; print(sys.stdin.readline(), end='')"  # then it closes the pipe, as `head -1` does
    writer = subprocess.Popen(
        [*START, "mistakes", "--list"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    reader = subprocess.run([sys.executable, "-c", first], stdin=writer.stdout, capture_output=True, text=True)
    writer.stdout.close()
    assert writer.stderr.read() == ""
    assert writer.wait(300) in (0, 141)  # all of it may have fitted into the pipe
    assert len(reader.stdout.splitlines()) == 1


def test_a_bug_is_still_shown_when_nobody_reads():
    done = without_a_reader([sys.executable, "-c", BROKEN])
    assert "IndexError" in done.stderr
    assert done.returncode != 0
