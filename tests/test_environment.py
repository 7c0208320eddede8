"""pyproject.toml holds the one list of dependencies; constraints.txt and environment.yml follow it."""
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def declared() -> list[str]:
    """Names under dependencies and the dev extra, read without tomllib, which Python 3.10 lacks."""
    text = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:dependencies|dev) = \[(.*?)\]\n", text, flags=re.M | re.S)
    return re.findall(r'"([A-Za-z0-9_-]+)[<>=!~]', "".join(lists))


def pins() -> dict[str, str]:
    """{name: version} of constraints.txt that hold for this Python."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        pin, _, marker = line.partition(";")
        name, version = pin.strip().split("==")
        old = sys.version_info < (3, 11)
        assert marker.strip() in ("", 'python_version >= "3.11"', 'python_version < "3.11"'), line
        if not marker or (old == ("<" in marker)):
            assert name not in found, f"{name} is pinned twice"
            found[name] = version
    return found


def test_every_declared_dependency_is_pinned_in_the_constraints():
    assert len(declared()) >= 15
    missing = {n for n in declared() if n.lower() not in pins()}
    # asked for with Python 3.11 or newer
    newer = {"snakemake", "peft", "onnx", "onnxscript", "onnxruntime", "openvino"}
    assert missing == (newer if sys.version_info < (3, 11) else set())


def test_environment_yml_is_a_thin_shell_over_pyproject_and_constraints():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    pip, = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert pip == ["--constraint constraints.txt", "--editable .[dev]"]
    needs = re.search(r'requires-python = "(.*?)"', (ROOT / "pyproject.toml").read_text()).group(1)
    assert conda == [f"python{needs}", "pip"]


@pytest.mark.parametrize("name", ["torch", "torchvision", "timm"])
def test_the_installed_versions_are_the_ones_that_were_tested_together(name):
    assert metadata.version(name).split("+")[0] == pins()[name]
