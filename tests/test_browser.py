"""Every notebook opened and run in JupyterLab, in a real browser, and its widgets moved by keyboard."""
import lab
import pytest

pytestmark = pytest.mark.skipif(bool(lab.missing()), reason=lab.missing() or "-")

# Of each notebook with widgets: sliders whose picture has to change on a key, pressed so often.
SLIDERS = {"03_prune_and_merge.ipynb": [("keep rate", "ArrowLeft", 10), ("block", "ArrowRight", 1)],
           "06_search.ipynb": [("evaluation", "ArrowLeft", 1), ("cut", "ArrowRight", 10)]}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    root = tmp_path_factory.mktemp("lab")
    lab.copies(root, root / "run", quick=True)
    with lab.lab(root) as found:
        yield found


@pytest.mark.parametrize("name", sorted(path.name for path in lab.NOTEBOOKS.glob("*.ipynb")))
def test_notebook_runs_to_the_end_in_jupyterlab_and_its_widgets_answer_to_keys(opened, name):
    opened.open(name)
    cells = opened.run_all()
    failed = [f"{o.ename}: {o.evalue}" for cell in cells for o in cell.outputs if o.output_type == "error"]
    assert not failed
    assert [cell.source for cell in cells if not cell.execution_count] == []
    for label, key, times in SLIDERS.get(name, []):
        assert opened.press(opened.slider(label), key, times), f"{label}: no other picture after {key}"
    text = opened.page.locator(".jp-Notebook").inner_text()
    assert "Error displaying widget" not in text and "Error creating widget" not in text and "Traceback" not in text
    assert opened.errors == []
