"""A package counts as there when it was really imported, and it is told from its namesakes by what pip calls it."""

import sys
from importlib import metadata

import pytest

from CMHA.packages import PACKAGES, Found, find
from tests.CMHA.implementations.fake_flash_attn import write_distribution


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty folder of installed packages at the front of sys.path; what is imported from it is forgotten after."""
    monkeypatch.syspath_prepend(str(tmp_path))
    find.cache_clear()
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("flash_attn", "flash_attn_interface"):
            del sys.modules[name]
    find.cache_clear()


def write(path, code: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code, encoding="utf-8")


def install_flash_attn_2(site, code: str = "") -> None:
    """As flash-attn 2.8.4 does: its first line lets other distributions add to the package."""
    write_distribution(site, "flash_attn", "2.8.4")
    extend = "from pkgutil import extend_path\n__path__ = extend_path(__path__, __name__)\nNUMBER = 2\n"
    write(site / "flash_attn" / "__init__.py", extend + code)


def install_flash_attn_4(site) -> None:
    """As flash-attn-4 does: it brings `flash_attn/cute/` and no `flash_attn/__init__.py`."""
    write_distribution(site, "flash-attn-4", "4.0.0b9")
    write(site / "flash_attn" / "cute" / "__init__.py", "NUMBER = 4\n")


def test_what_is_not_installed_has_neither_a_version_nor_an_error(site):
    assert find("flash_attn_2") == Found(version=None, error=None)
    assert not find("flash_attn_2").available


def test_what_is_installed_is_imported_and_has_its_version(site):
    install_flash_attn_2(site)
    found = find("flash_attn_2")
    assert (found.version, found.error, found.available) == ("2.8.4", None, True)
    assert found.module is sys.modules["flash_attn"]


def test_a_wheel_that_is_found_and_does_not_import_is_not_available_and_says_why(site):
    error = "ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEi\\nat line 2')"
    install_flash_attn_2(site, f"raise {error}\n")
    found = find("flash_attn_2")
    assert not found.available
    assert found.version == "2.8.4"
    assert found.error == "ImportError: flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEi"


@pytest.mark.parametrize("raised", ["RuntimeError('no driver')", "OSError('libcudart')", "AttributeError()"])
def test_whatever_an_import_raises_is_caught(raised, site):
    install_flash_attn_2(site, f"raise {raised}\n")
    assert find("flash_attn_2").error.startswith(raised.partition("(")[0])


def test_a_folder_of_that_name_that_nobody_installed_does_not_count(site):
    write(site / "flash_attn" / "__init__.py", "")
    assert find("flash_attn_2") == Found()


def test_flash_attention_4_alone_is_not_taken_for_2(site):
    install_flash_attn_4(site)
    assert find("flash_attn_4").module.NUMBER == 4
    assert find("flash_attn_4").version == "4.0.0b9"
    assert not find("flash_attn_2").available


def test_flash_attention_2_alone_is_not_taken_for_4(site):
    install_flash_attn_2(site)
    write(site / "flash_attn" / "cute" / "__init__.py", "")  # flash-attn 2.8.3 had a copy of it inside
    assert find("flash_attn_2").module.NUMBER == 2
    assert not find("flash_attn_4").available


@pytest.mark.parametrize("order", [("flash_attn_2", "flash_attn_4"), ("flash_attn_4", "flash_attn_2")])
def test_flash_attention_2_and_4_live_side_by_side_in_two_folders(order, site, monkeypatch):
    install_flash_attn_2(site / "one")
    install_flash_attn_4(site / "two")
    for folder in ("two", "one"):
        monkeypatch.syspath_prepend(str(site / folder))
    numbers = {name: find(name).module.NUMBER for name in order}
    assert numbers == {"flash_attn_2": 2, "flash_attn_4": 4}


@pytest.mark.parametrize("spelling", ["flash_attn_3", "flash-attn-3", "Flash.Attn_3"])
def test_the_spelling_of_a_distribution_does_not_matter(spelling, site):
    write_distribution(site, spelling.replace(".", "_"), "3.0.0")
    write(site / "flash_attn_interface.py", "NUMBER = 3\n")
    assert find("flash_attn_3").module.NUMBER == 3


def test_a_package_is_looked_at_once_in_a_process(site):
    assert not find("flash_attn_2").available
    install_flash_attn_2(site)
    assert not find("flash_attn_2").available
    find.cache_clear()
    assert find("flash_attn_2").available


def test_a_package_that_is_really_here_has_the_version_that_pip_says():
    here = [name for name in PACKAGES if find(name).available]
    for name in here:
        assert find(name).version == metadata.version(PACKAGES[name].distribution)


@pytest.mark.parametrize("name", PACKAGES)
def test_every_package_says_how_to_install_itself_and_what_for(name):
    package = PACKAGES[name]
    assert package.install.startswith("pip install ")
    assert package.purpose
    assert package.distribution in package.install or "git+" in package.install


def test_what_a_package_prints_while_it_is_imported_goes_to_stderr(site, capsys):
    """Else a greeting would end up in the JSON of `doctor --json`."""
    (site / "flash_attn-9.9.dist-info").mkdir()
    metadata_of_it = "Metadata-Version: 2.1\nName: flash-attn\nVersion: 9.9\n"
    (site / "flash_attn-9.9.dist-info" / "METADATA").write_text(metadata_of_it)
    (site / "flash_attn.py").write_text("print('hello from flash-attn')\n")
    assert find("flash_attn_2").version == "9.9"
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "hello from flash-attn\n")
