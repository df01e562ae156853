"""What flash-attn's build needs is found where it lies, and what is wrong is said with what to do."""

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from CMHA import packages
from orchestrator.cli import main
from orchestrator.evaluation import build_tools
from orchestrator.evaluation.doctor import examine

NVCC = """nvcc: NVIDIA (R) Cuda compiler driver
Copyright (c) 2005-2025 NVIDIA Corporation
Built on Wed_Jan_15_19:20:09_PST_2025
Cuda compilation tools, release {release}, V{release}.61
Build cuda_{release}.r{release}/compiler.35404655_0
"""
GIB = 2**30


def program(folder: Path, name: str, prints: str = "", then: str = "exit 0") -> Path:
    """A program that prints a text, as a real one on PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.txt").write_text(prints)
    lines = (folder / f"{name}.txt").read_text().replace("'", "'\\''")
    (folder / name).write_text(f"#!/bin/sh\nprintf '%s' '{lines}'\n{then}\n")
    (folder / name).chmod(0o755)
    return folder / name


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine with nothing on PATH but what the test puts there, and no toolkit."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(build_tools, "TOOLKIT", tmp_path / "no-toolkit")
    return tmp_path / "bin"


def compiling(capsys) -> str:
    """What `doctor` prints about the build, here."""
    assert main(["doctor"]) == 0
    (section,) = [part for part in capsys.readouterr().out.split("\n\n") if part.startswith("To compile flash-attn")]
    return section


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("gcc (Debian 12.2.0-14+deb12u1) 12.2.0", "12.2.0"),
        ("gcc (Ubuntu 11.4.0-1ubuntu1~22.04) 11.4.0\nCopyright (C) 2021", "11.4.0"),
        ("gcc (GCC) 8.5.0 20210514 (Red Hat 8.5.0-18)", "8.5.0"),
        ("gcc (crosstool-NG 1.25.0.55_3d164b1) 12.2.0", "12.2.0"),
        ("Apple clang version 15.0.0 (clang-1500.3.9.4)", "15.0.0"),
        ("1.11.1.git.kitware.jobserver-1", "1.11.1"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_version_is_read_from_the_first_line_that_a_program_prints(line, version, bare):
    path = program(bare, "gcc", line)
    found = build_tools.find_program("gcc", "install it")
    assert (found.verdict, found.facts) == ("ok", {"path": str(path), "version": version})


@pytest.mark.parametrize("then", ["exit 1", "kill -9 $$", "while :; do :; done"])
def test_a_program_that_fails_or_hangs_is_missing_and_ends_nothing(then, bare, monkeypatch):
    monkeypatch.setattr(build_tools, "SECONDS", 0.3)
    path = program(bare, "g++", "g++ (GCC) 12.2.0", then)
    found = build_tools.find_program("g++", "install it")
    assert (found.verdict, found.found, found.remedy) == ("missing", f"{path} does not run", "install it")


def test_with_nothing_on_path_everything_is_missing_with_what_to_do_where_there_is_a_gpu(bare, capsys):
    tools = build_tools.look_at_build_tools()
    page = compiling(capsys)
    gpu = torch.cuda.is_available()
    assert ("none of it is needed here" in page, "What to do" in page) == (not gpu, gpu)
    for name in ("gcc", "g++", "nvcc", "ninja"):
        assert (tools[name].verdict, bool(tools[name].remedy)) == ("missing", True)
        assert tools[name].facts["path"] is None
    assert not tools["ninja"].stops  # slow without it, but it builds
    assert tools["nvcc"].stops


def test_nvcc_is_looked_for_where_torch_looks(bare, monkeypatch, tmp_path):
    release = {}
    for place in ("toolkit", "path", "home"):
        release[place] = f"12.{len(release)}"
        folder = {"toolkit": tmp_path / "no-toolkit" / "bin", "path": bare, "home": tmp_path / "home" / "bin"}[place]
        program(folder, "nvcc", NVCC.format(release=release[place]))
        if place == "home":
            monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
        found = build_tools.find_nvcc()
        assert (found.verdict, found.facts["version"]) == ("ok", release[place]), place
        assert found.facts["path"] == str(folder / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "empty"))
    found = build_tools.find_nvcc()
    assert (found.verdict, f"CUDA_HOME={tmp_path}/empty has no bin/nvcc" in found.found) == ("missing", True)


@pytest.mark.parametrize(
    ("toolkit", "cuda_of_torch", "verdict", "stops"),
    [
        ("13.0", "13.0", "ok", False),
        ("12.8", "13.0", "mismatch", True),  # torch's builder refuses another major version
        ("13.1", "13.0", "mismatch", False),  # and warns of another minor one
        ("12.8", None, "not needed", False),
    ],
)
def test_the_toolkit_is_held_against_torchs_cuda(toolkit, cuda_of_torch, verdict, stops, bare, monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", cuda_of_torch)
    program(bare, "nvcc", NVCC.format(release=toolkit))
    found = build_tools.look_at_build_tools()["toolkit"]
    assert (found.verdict, found.stops) == (verdict, stops)
    assert found.facts == {"toolkit": toolkit, "torch": cuda_of_torch}
    row = next(line for line in compiling(capsys).splitlines() if line.startswith("  toolkit"))
    assert row.split(maxsplit=1)[1].startswith(verdict)
    if verdict in ("ok", "mismatch"):
        assert f"toolkit {toolkit}, torch's CUDA {cuda_of_torch}" in row


def test_a_gpu_that_torch_cannot_use_is_what_is_missing(bare, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this torch can use the GPU")
    program(
        bare, "nvidia-smi", "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)\nGPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2)\n"
    )
    monkeypatch.setattr(torch.version, "cuda", None)
    (item,) = [item for item in examine("cpu")["missing"] if item["what"] == "the GPU"]
    assert (item["why"], "CUDA build of torch" in item["do"][0]) == ("2, but torch was not built for CUDA", True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (item,) = [item for item in examine("cpu")["missing"] if item["what"] == "the GPU"]
    assert "driver to one for CUDA 13.0" in item["do"][0]
    program(bare, "nvidia-smi", "No devices were found\n")
    assert not [item for item in examine("cpu")["missing"] if item["what"] == "the GPU"]


@pytest.fixture
def hopper(monkeypatch):
    """What torch says of itself on a machine with an H100; its kernels are not asked for."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    properties = SimpleNamespace(name="NVIDIA H100", total_memory=80 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)


def test_on_a_gpu_the_steps_to_flash_attn_begin_with_what_stops_its_build(bare, hopper, monkeypatch):
    program(bare, "nvcc", NVCC.format(release="12.8"))
    monkeypatch.setattr("orchestrator.evaluation.doctor.find", lambda name: packages.Found())
    monkeypatch.setattr("CMHA.implementations.flash_package.find", lambda name: packages.Found())
    facts = examine("cuda")
    assert facts["devices"][1] == {
        "type": "cuda:0", "name": "NVIDIA H100", "capability": [9, 0], "memory_bytes": 80 * GIB,
    }  # fmt: skip
    (item,) = [item for item in facts["missing"] if item["what"] == "flash_attention_2"]
    assert "flash-attn is not installed" in item["why"]
    *first, jobs, install = item["do"]
    assert "ninja" not in " ".join(first)  # it builds without, if slowly
    assert first[0].startswith("install gcc")
    assert "install the CUDA toolkit 13.0, or a torch that was built for CUDA 12.8" in first
    assert jobs == f"export MAX_JOBS={facts['build']['memory']['facts']['max_jobs']}"
    assert install == packages.PACKAGES["flash_attn_2"].install
    for name in ("gcc", "g++", "ninja"):
        program(bare, name, f"{name} (GCC) 12.2.0")
    program(bare, "nvcc", NVCC.format(release="13.0"))
    monkeypatch.setattr(build_tools, "PYTHON_PACKAGES", ("json",))
    (item,) = [item for item in examine("cuda")["missing"] if item["what"] == "flash_attention_2"]
    assert item["do"] == [jobs, install]


def test_a_wheel_that_does_not_import_goes_before_another_is_built(bare, hopper, monkeypatch):
    broken = packages.Found("2.8.4", error="ImportError: undefined symbol")
    monkeypatch.setattr("orchestrator.evaluation.doctor.find", lambda name: broken)
    monkeypatch.setattr("CMHA.implementations.flash_package.find", lambda name: broken)
    (item,) = [item for item in examine("cuda")["missing"] if item["what"] == "flash_attention_2"]
    # "already satisfied", and the same wheel from pip's cache, would change nothing
    assert item["do"][-3] == "pip uninstall -y flash-attn"
    assert item["do"][-1].endswith("--no-cache-dir")


def test_on_a_gpu_that_flash_attn_does_not_serve_it_is_not_missing(bare, hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert not [item for item in examine("cuda")["missing"] if item["what"].startswith("flash_attention")]


def test_memory_is_what_the_system_says(monkeypatch):
    monkeypatch.setattr(build_tools, "CGROUP_LIMITS", ())
    memory = build_tools.read_memory()
    assert memory["total_bytes"] == psutil.virtual_memory().total
    assert memory["available_bytes"] < memory["total_bytes"]
    assert memory["available_bytes"] == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_a_container_has_no_more_memory_than_it_is_allowed(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text(f"{GIB}\n")
    monkeypatch.setattr(build_tools, "CGROUP_LIMITS", (tmp_path / "none", tmp_path / "memory.max"))
    assert build_tools.read_memory() == {"total_bytes": GIB, "available_bytes": GIB}
    (tmp_path / "memory.max").write_text("max\n")
    assert build_tools.read_memory()["total_bytes"] == psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("available", "cores", "jobs"),
    [(8 * GIB, 16, 1), (64 * GIB, 64, 3), (128 * GIB, 64, 6), (1024 * GIB, 8, 4), (1024 * GIB, 1, 1), (None, 8, 1)],
)
def test_jobs_are_as_many_as_memory_and_cores_bear(available, cores, jobs, monkeypatch):
    memory = {"total_bytes": available and 2 * available, "available_bytes": available}
    monkeypatch.setattr(build_tools, "read_memory", lambda: memory)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    found = build_tools.weigh_memory()
    assert found.facts["max_jobs"] == jobs
    assert f"MAX_JOBS={jobs}" in found.found
    assert (found.remedy is not None) == (available == 8 * GIB)  # one job may take more than that
