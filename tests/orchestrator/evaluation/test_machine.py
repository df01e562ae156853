"""What a result is read with: how Triton runs kernels here, and the driver where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.evaluation.machine import driver_version, machine_facts, triton_runs
from tests.triton_interpreter import DEVICE

ROOT = Path(__file__).resolve().parent.parent.parent.parent
ASK = "from orchestrator.evaluation.machine import triton_runs; print(triton_runs())"


@pytest.mark.parametrize(("value", "runs"), [("1", "interpreter"), ("0", "compiler")])
def test_triton_runs_what_the_environment_said_when_it_was_imported(value, runs):
    environment = os.environ | {"TRITON_INTERPRET": value}
    done = subprocess.run([sys.executable, "-c", ASK], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == runs, done.stderr


def test_the_facts_of_a_machine_say_how_triton_runs():
    facts = machine_facts("cpu")
    assert facts["triton_runs"] == triton_runs()
    assert facts["triton_runs"] == ("interpreter" if DEVICE == "cpu" else "compiler")  # as tests/conftest.py imports it
    assert "gpu" not in facts


@pytest.mark.parametrize(("says", "version"), [("echo 575.57.08", "575.57.08"), ("exit 9", None)])
def test_the_driver_is_what_nvidia_smi_says(tmp_path, monkeypatch, says, version):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{says}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert driver_version() == version
    monkeypatch.setenv("PATH", "/nothing")
    assert driver_version() is None
