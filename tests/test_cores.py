"""Threads and cores: a container's limit, a busy machine, and threads that do not spin."""
import os
import subprocess
import sys

import pytest

from vitlab.runtime.cores import available_cores, load_in_words

HERE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.mark.parametrize("text, cores", [("100000 100000\n", 1), ("150000 100000\n", min(2, HERE)), ("10000 100000", 1),
                                         ("max 100000\n", HERE), ("99999900000 100000", HERE), ("", HERE)])
def test_no_more_cores_are_used_than_a_container_grants(tmp_path, text, cores):
    (tmp_path / "cpu.max").write_text(text)
    assert available_cores(tmp_path / "cpu.max") == cores


def test_without_a_container_all_cores_of_the_process_are_used(tmp_path):
    assert available_cores(tmp_path / "cpu.max") == HERE


@pytest.mark.parametrize("given, expected", [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_sleep_while_they_wait_unless_the_environment_says_otherwise(given, expected):
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    code = "import os, vitlab, sys; assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    said = subprocess.run([sys.executable, "-c", code], env=env | ({} if given is None else {"OMP_WAIT_POLICY": given}),
                          check=True, text=True, capture_output=True).stdout
    assert said.strip() == expected


def test_a_load_over_the_cores_is_said():
    assert load_in_words(3.5, 2) == ("load 3.5 on 2 core(s): more than there are, so everything takes longer than it "
                                     "says, and speeds say little")
    assert load_in_words(2.0, 2) == "load 2.0 on 2 core(s)"
