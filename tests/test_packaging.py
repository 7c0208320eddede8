"""What a plain pip install gives: a wheel is built, and run from an empty folder."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pytest

from vitlab.runtime.files import BATCHES, NOTEBOOKS, InputError
from vitlab.workbench import notebooks
from vitlab.workbench.batch_file import find

pytest.importorskip("setuptools", minversion="77", reason="the wheel is built by the setuptools that is here")
ROOT = Path(__file__).parents[1]
RUN = ("import sys, vitlab; from vitlab.cli import main; print(vitlab.__file__); "
       "sys.exit(main(['notebooks', 'mine']) or main(['batch', 'digits', '--dry-run']))")
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds what the wheel holds."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("vitlab", "notebooks", "batches"):
        shutil.copytree(ROOT / name, folder / "source" / name,
                        ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=folder / "source", check=True, capture_output=True)
    zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(folder / "installed")
    return folder / "installed"


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if ".ipynb_checkpoints" not in p.parts
            and (p.suffix in (".py", ".js", ".ipynb", ".yaml") or p.name == "Snakefile")}


def test_the_wheel_holds_every_module_notebook_and_batch_file(installed):
    wanted = names(ROOT / "vitlab") | {f"{name}/{file}" for name in ("notebooks", "batches")
                                       for file in names(ROOT / name)}
    assert names(installed / "vitlab") == wanted


def test_an_installed_vitlab_finds_its_notebooks_and_batch_files_from_any_folder(installed, tmp_path):
    pytest.importorskip("snakemake", reason="batches need Snakemake, which needs Python 3.11 or newer")
    said = subprocess.run([sys.executable, "-c", RUN], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)},
                          check=True, text=True, capture_output=True).stdout
    assert said.startswith(str(installed)) and "would run" in said
    assert {p.name: p.read_bytes()
            for p in (tmp_path / "mine").iterdir()} == {p.name: p.read_bytes() for p in NOTEBOOKS.glob("*.ipynb")}


DEMO = ("from vitlab.workbench import demo; demo.STORY = {'00_check_setup': {}, '90_results': {}}; "
        "from vitlab.cli import main; raise SystemExit(main(['demo', '--quick']))")


def test_the_demo_of_an_installed_vitlab_is_a_line_a_notebook_and_ends_with_one_when_interrupted(installed, tmp_path):
    """Its first notebook, and the start of another; a study would take minutes."""
    demo = subprocess.Popen([sys.executable, "-c", DEMO], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)},
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert re.fullmatch(r"\[1/2\] 00_check_setup +\d+ s\n", demo.stderr.readline())
    kernels: list[psutil.Process] = []
    while not kernels and demo.poll() is None:
        time.sleep(0.05)
        kernels = psutil.Process(demo.pid).children(recursive=True)
    os.killpg(demo.pid, signal.SIGINT)
    out, error = demo.communicate(timeout=120)
    assert (demo.returncode, out) == (130, "")
    assert error == "vitlab demo: interrupted; the same command begins anew; its trainings and searches go on\n"
    assert not psutil.wait_procs(kernels, timeout=20)[1]
    assert (tmp_path / "runs" / "demo" / "notebooks" / "00_check_setup.ipynb").is_file()


def test_notebooks_that_were_changed_are_not_replaced(tmp_path):
    first = notebooks.copy_all(tmp_path)[0]
    assert notebooks.copy_all(tmp_path)[0] == first
    first.write_text("{}")
    (tmp_path / "91_report.ipynb").unlink()
    with pytest.raises(InputError, match=f"{first.name}: there already, and not as it comes"):
        notebooks.copy_all(tmp_path)
    assert first.read_text() == "{}" and not (tmp_path / "91_report.ipynb").exists()


def test_a_batch_file_is_meant_before_one_that_comes_with_vitlab(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find("digits") == BATCHES / "digits.yaml" and find("other") == Path("other") and find("a/digits") == Path(
        "a/digits")
    Path("digits").write_text("entries: {}")
    assert find("digits") == Path("digits")
