"""What compiling flash-attn takes, and whether this machine has it: compilers, the CUDA toolkit, memory.

flash-attn's wheels are made for few versions of torch; for any other, pip compiles it here, for minutes to hours, and
what is missing shows late and obscurely. The rules are those of torch.utils.cpp_extension and of flash-attn's setup.py.
Nothing here raises: what cannot be found out is None.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import torch

TOOLKIT = Path("/usr/local/cuda")  # where torch looks when neither CUDA_HOME nor PATH leads to nvcc
PYTHON_PACKAGES = ("setuptools", "wheel", "packaging", "psutil")  # --no-build-isolation: they must be here already
BYTES_PER_JOB = 20 * 2**30  # flash-attn's setup.py: 5 GB at worst for each of the 4 threads of one nvcc
SECONDS = 20  # a program that says its version takes less
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for.

    Attributes:
        verdict: "ok", "missing", "mismatch", or "not needed".
        found: what there is, in a few words.
        remedy: what to do about it; None: nothing.
        stops: whether the build cannot succeed like this.
        facts: the same as data, JSON-ready; a value is None where it could not be found out.
    """

    verdict: str
    found: str
    remedy: str | None = None
    stops: bool = False
    facts: dict = field(default_factory=dict)


def look_at_build_tools() -> dict[str, Finding]:
    """Everything that building flash-attn takes, by name, in the order in which a person would ask."""
    nvcc = find_nvcc()
    return {
        "GPU": find_gpu(),
        "gcc": find_program("gcc", "install gcc: apt-get install build-essential, or as your system does"),
        "g++": find_program("g++", "install g++: apt-get install build-essential, or as your system does"),
        "nvcc": nvcc,
        "toolkit": match_toolkit(nvcc.facts["version"], torch.version.cuda),
        "ninja": find_program("ninja", "pip install ninja, or one file is compiled at a time, for hours", stops=False),
        "Python packages": find_python_packages(),
        "Python headers": find_headers(),
        "memory": weigh_memory(),
    }


def output_of(*command: str) -> str | None:
    """What a program prints; None where it cannot run, fails, or does not come back in time."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def version_in(text: str | None) -> str | None:
    """The version in a program's first line: "gcc (Debian 12.2.0-14) 12.2.0" -> "12.2.0"."""
    first = next(iter((text or "").splitlines()), "")
    number = re.search(r"\d+(\.\d+)+", re.sub(r"\(.*?\)", "", first))  # brackets hold the packager's own numbers
    return number.group() if number else None


def find_program(name: str, remedy: str, stops: bool = True) -> Finding:
    """Is `name` on PATH, and does it run?"""
    path = shutil.which(name)
    printed = output_of(path, "--version") if path else None
    facts = {"path": path, "version": version_in(printed)}
    if printed is None:
        return Finding("missing", f"{path} does not run" if path else "not found", remedy, stops, facts)
    return Finding("ok", f"{facts['version'] or 'of unknown version'} ({path})", facts=facts)


def find_nvcc() -> Finding:
    """NVIDIA's compiler, looked for where torch looks: CUDA_HOME or CUDA_PATH, then PATH, then /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = Path(home) / "bin" / "nvcc" if home else shutil.which("nvcc") or TOOLKIT / "bin" / "nvcc"
    printed = output_of(str(path), "--version")
    release = re.search(r"release (\d+\.\d+)", printed or "")
    facts = {
        "path": str(path) if printed else None,
        "version": release.group(1) if release else None,
        "CUDA_HOME": home,
        str(TOOLKIT): str(TOOLKIT.resolve()) if TOOLKIT.exists() else None,
    }
    if printed is None:
        where = f"CUDA_HOME={home} has no bin/nvcc that runs" if home else f"not on PATH, nor in {TOOLKIT}/bin"
        wanted = f" {torch.version.cuda}" if torch.version.cuda else ""
        remedy = f"install the CUDA toolkit{wanted} and set CUDA_HOME to its folder; the driver alone has no nvcc"
        return Finding("missing", where, remedy, stops=True, facts=facts)
    return Finding("ok", f"{facts['version'] or 'of unknown version'} ({path})", facts=facts)


def match_toolkit(toolkit: str | None, cuda_of_torch: str | None) -> Finding:
    """Is the toolkit of the CUDA that torch was built with? Versions as "12.8"; None: there is none.

    Torch's builder refuses another major version, and warns of another minor one.
    """
    facts = {"toolkit": toolkit, "torch": cuda_of_torch}
    if cuda_of_torch is None:
        return Finding("not needed", "torch was not built for CUDA: there is nothing to match", facts=facts)
    if toolkit is None:
        return Finding("missing", f"no toolkit to match torch's CUDA {cuda_of_torch}", facts=facts)
    both = f"toolkit {toolkit}, torch's CUDA {cuda_of_torch}"
    if toolkit.split(".")[:2] == cuda_of_torch.split(".")[:2]:
        return Finding("ok", both, facts=facts)
    exact = f"install the CUDA toolkit {cuda_of_torch}, or a torch that was built for CUDA {toolkit}"
    if toolkit.split(".")[0] == cuda_of_torch.split(".")[0]:
        return Finding("mismatch", both, f"it may build, with a warning; to be sure, {exact}", facts=facts)
    return Finding("mismatch", both, exact, stops=True, facts=facts)


def find_python_packages() -> Finding:
    """What setup.py imports: pip brings it only into an isolated build, and this one is not (it needs your torch)."""
    facts = {name: importlib.util.find_spec(name) is not None for name in PYTHON_PACKAGES}
    missing = [name for name, here in facts.items() if not here]
    if missing:
        return Finding("missing", ", ".join(missing), f"pip install {' '.join(missing)}", stops=True, facts=facts)
    return Finding("ok", ", ".join(PYTHON_PACKAGES), facts=facts)


def find_headers() -> Finding:
    """Python.h: flex_attention on a CPU compiles with it too."""
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    facts = {"path": str(header) if header.exists() else None}
    if not header.exists():
        remedy = "install them: apt-get install python3-dev, or as your system does"
        return Finding("missing", f"no {header}", remedy, stops=True, facts=facts)
    return Finding("ok", str(header), facts=facts)


def find_gpu() -> Finding:
    """Is there an NVIDIA GPU, and can this torch use it? Asked of the driver too: torch sees none without its help."""
    listed = output_of("nvidia-smi", "-L")
    seen = [line.strip() for line in (listed or "").splitlines() if line.startswith("GPU")]
    usable = torch.cuda.is_available() and torch.version.hip is None
    facts = {"usable_by_torch": usable, "seen_by_driver": len(seen) if listed is not None else None}
    if usable:
        return Finding("ok", torch.cuda.get_device_name(), facts=facts)
    if not seen:
        return Finding("missing", "no NVIDIA GPU: flash-attn cannot be used here", stops=True, facts=facts)
    if torch.version.cuda is None:
        remedy = "install a CUDA build of torch: its own site gives the line"
        return Finding("mismatch", f"{len(seen)}, but torch was not built for CUDA", remedy, stops=True, facts=facts)
    remedy = f"update the driver to one for CUDA {torch.version.cuda}, and look at CUDA_VISIBLE_DEVICES"
    return Finding("mismatch", f"{len(seen)}, but torch cannot use it", remedy, stops=True, facts=facts)


def weigh_memory() -> Finding:
    """How many files may be compiled at a time: too many at once, and the machine runs out of memory."""
    memory = read_memory()
    available = memory["available_bytes"] or memory["total_bytes"]
    if available is None:
        return Finding("ok", "unknown; MAX_JOBS=1 to be safe", facts={**memory, "max_jobs": 1})
    jobs = max(1, min((os.cpu_count() or 2) // 2, available // BYTES_PER_JOB))
    found = f"{gib(available)} available of {gib(memory['total_bytes'])}: MAX_JOBS={jobs}"
    if available < BYTES_PER_JOB:
        remedy = f"one job may take {gib(BYTES_PER_JOB)}: set NVCC_THREADS=1 too"
        return Finding("mismatch", found, remedy, facts={**memory, "max_jobs": jobs})
    return Finding("ok", found, facts={**memory, "max_jobs": jobs})


def gib(count: int | None) -> str:
    """Bytes for a person: "23.5 GiB"."""
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"


def read_memory() -> dict[str, int | None]:
    """total_bytes and available_bytes of main memory, both at most what a container is allowed; None: not known."""
    total = available = None
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for line in (read(Path("/proc/meminfo")) or "").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limits = [int(text) for path in CGROUP_LIMITS if (text := (read(path) or "").strip()).isdigit()]
    return {
        "total_bytes": min([total, *limits]) if total else None,
        "available_bytes": min([available, *limits]) if available else None,
    }


def read(path: Path) -> str | None:
    """The file's text; None where there is none to read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
