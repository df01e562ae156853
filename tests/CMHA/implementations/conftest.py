"""What the tests of the flash-attn adapters share: fake packages that are found as real ones are."""

import pytest

from CMHA import packages
from tests.CMHA.implementations import fake_flash_attn


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """fakes("flash_attn_2") installs the fake of that package: from then on `packages.find` finds and imports it."""

    def install(name):
        packages.find.cache_clear()  # it remembers what it found for the process
        return fake_flash_attn.install(name, tmp_path, monkeypatch)

    packages.find.cache_clear()
    yield install
    packages.find.cache_clear()
