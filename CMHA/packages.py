"""Which packages for attention this machine has: really imported, not only looked up.

Why import: a wheel that was built against another torch is found by pip and by `find_spec`, and then fails to import.
Why also by distribution name: FlashAttention-2 and -4 share the import name `flash_attn`.
"""

import contextlib
import importlib
import sys
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from types import ModuleType


@dataclass(frozen=True)
class Package:
    """A package that an implementation can use.

    Attributes:
        distribution: what pip calls it.
        module: what is imported.
        install: the line that installs it.
        purpose: what it is for, in a few words.
    """

    distribution: str
    module: str
    install: str
    purpose: str


# pip compares names without regard to case, "-", "_" and ".": FlashAttention-3's setup.py says flash_attn_3.
PACKAGES = {
    "flash_attn_2": Package(
        distribution="flash-attn",
        module="flash_attn",
        install="pip install flash-attn --no-build-isolation",
        purpose="FlashAttention-2 (CUDA, Ampere or later)",
    ),
    "flash_attn_3": Package(
        distribution="flash-attn-3",
        module="flash_attn_interface",
        install='pip install --no-build-isolation "git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper"',
        purpose="FlashAttention-3 (CUDA, Hopper)",
    ),
    "flash_attn_4": Package(
        distribution="flash-attn-4",
        module="flash_attn.cute",
        install="pip install flash-attn-4",
        purpose="FlashAttention-4 (CUDA, Hopper and Blackwell)",
    ),
    "triton": Package(
        distribution="triton",
        module="triton",
        install="pip install triton",
        purpose="our own GPU kernels, and torch.compile on CUDA",
    ),
}


@dataclass(frozen=True)
class Found:
    """What became of importing a package.

    Attributes:
        version: of the installed distribution; None: not installed.
        error: why the import failed, in one line; None: it did not, or there was nothing to import.
        module: the imported module, or None.
    """

    version: str | None = None
    error: str | None = None
    module: ModuleType | None = field(default=None, compare=False, repr=False)

    @property
    def available(self) -> bool:
        """Installed, and imported without an error."""
        return self.module is not None


@cache
def find(name: str) -> Found:
    """Import a package of `PACKAGES` if its distribution is installed. Looked at once in a process."""
    package = PACKAGES[name]
    try:
        version = metadata.version(package.distribution)
    except metadata.PackageNotFoundError:
        return Found()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # a package that greets must not end up in somebody's JSON
            return Found(version, module=importlib.import_module(package.module))
    except Exception as error:  # whatever a broken wheel raises: ImportError, OSError, RuntimeError, ...
        line = next(iter(str(error).splitlines()), "")
        return Found(version, error=f"{type(error).__name__}: {line}")
