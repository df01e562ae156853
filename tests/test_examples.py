"""The examples run from any folder, print what they promise, and fail when something is wrong."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_from_another_folder_and_says_pass(example, tmp_path):
    done = subprocess.run([sys.executable, example], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("PASS")
    assert '"flash_attention_supported": true' in done.stdout
    assert done.stderr == ""


def test_the_example_fails_when_flash_and_manual_do_not_agree(monkeypatch, capsys):
    from CMHA.choosing.choose import chosen_once
    from CMHA.implementations import sdpa

    real = sdpa.attention
    monkeypatch.setattr(sdpa, "attention", lambda *args, scale, **more: real(*args, scale=scale * 1.01, **more))
    chosen_once.cache_clear()
    try:
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(EXAMPLES[0]), run_name="__main__")
    finally:
        chosen_once.cache_clear()
    assert left.value.code == 1
    assert "FAIL" in capsys.readouterr().out
