"""How much memory a process may still take: what the machine has free, and what a container's limit leaves of it.

A machine that runs out of memory seldom raises an error: it swaps, or the system ends a process. So what would not fit
is refused before it is begun, with both figures.
"""

from pathlib import Path

import torch

ASSUMED_FREE = 4 * 2**30  # bytes, where the system does not tell


def free_memory(device: str = "cpu") -> int:
    """Bytes that a process may still take on the device, as far as the system tells."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    if device == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    known = [free_of_machine(), *(free_of_container(folder) for folder in limits_of_this_process())]
    return min((free for free in known if free is not None), default=ASSUMED_FREE)


def free_of_machine() -> int | None:
    """MemAvailable on Linux (free, or quickly freed); None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def limits_of_this_process(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> list[Path]:
    """The folders whose limits hold for this process: of its own cgroup, and of all above it up to the container's.

    Source: cgroups(7): the line "0::/PATH" of /proc/self/cgroup, or in version 1 "NUMBER:memory:/PATH".
    """
    try:
        lines = Path(own).read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    folders = [Path(root), Path(root) / "memory"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory") and ".." not in path:  # "..": seen from inside a container
            folder = folders[controllers == "memory"]
            for part in Path(path).parts[1:]:
                folder = folder / part
                folders.append(folder)
    return folders


# Names in version 2 of cgroups, and in version 1.
LIMIT_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_of_container(folder: str | Path = "/sys/fs/cgroup") -> int | None:
    """What a container's limit leaves; None where there is no limit."""
    for limit_file, used_file, cache in LIMIT_FILES:
        try:
            limit, used = (int((Path(folder) / name).read_text()) for name in (limit_file, used_file))
            words = (Path(folder) / "memory.stat").read_text().split()
        except (OSError, ValueError):  # no such file; "max": no limit
            continue
        cached_files = int(words[words.index(cache) + 1]) if cache in words else 0  # quickly freed
        return max(0, limit - used + cached_files)
    return None


def gib(size: int | float) -> str:
    """Bytes as text: in GiB, or in MiB where that says more."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def mib(size: int | float) -> str:
    """A size in bytes for a person; of small ones a digit behind the point."""
    return f"{size / 2**20:,.{0 if size >= 10 * 2**20 else 1}f} MiB"
