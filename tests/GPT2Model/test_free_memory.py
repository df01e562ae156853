"""How much memory is free: the limits are read as the system writes them."""

from pathlib import Path

import psutil

from GPT2Model.free_memory import free_memory, free_of_container, free_of_machine, gib, limits_of_this_process


def test_the_limit_of_a_container_counts_and_its_cached_files_do_not(tmp_path):
    assert free_of_container(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\nactive_file 100\ninactive_file 200\n")
    assert free_of_container(tmp_path) == 500
    (tmp_path / "memory.current").write_text("1300\n")
    assert free_of_container(tmp_path) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert free_of_container(tmp_path) is None


def test_the_older_names_of_a_container_s_limit_are_read_too(tmp_path):
    (tmp_path / "memory.limit_in_bytes").write_text("1000\n")
    (tmp_path / "memory.usage_in_bytes").write_text("700\n")
    (tmp_path / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 200\n")
    assert free_of_container(tmp_path) == 500


def test_every_group_above_a_process_may_limit_it(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("0::/user.slice/run-7.scope\n")
    root = tmp_path / "fs"
    named = {folder.relative_to(root).as_posix() for folder in limits_of_this_process(str(root), str(own))}
    assert named == {".", "memory", "user.slice", "user.slice/run-7.scope"}
    own.write_text("9:name=systemd:/a\n4:memory:/job/step\n0::/\n")
    named = {folder.relative_to(root).as_posix() for folder in limits_of_this_process(str(root), str(own))}
    assert named == {".", "memory", "memory/job", "memory/job/step"}
    own.write_text("0::/../../outside\n")
    assert len(limits_of_this_process(str(root), str(own))) == 2
    assert len(limits_of_this_process(str(root), str(tmp_path / "nowhere"))) == 2


def test_the_machine_s_free_memory_is_what_psutil_says():
    machine, independent = free_of_machine(), psutil.virtual_memory()
    assert (machine is None) == (not Path("/proc/meminfo").exists())
    assert abs((machine or independent.available) - independent.available) < 0.1 * independent.total
    assert 2**20 < free_memory("cpu") < 2**50


def test_bytes_are_said_in_gib_or_mib():
    assert gib(3 * 2**30) == "3.0 GiB"
    assert gib(2**20 * 1.5) == "1.5 MiB"
    assert gib(4000 * 2**30) == "4,000.0 GiB"
