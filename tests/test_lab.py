"""A notebook in a browser with what people bring: their own weights, without a classifier, and their own photographs.
"""
import lab
import pytest
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

from vitlab.models.create import create_model
from vitlab.models.opening import open_model
from vitlab.runtime.config import RunConfig
from vitlab.workbench.scoring import score_tokens

NAME, BACKBONE = "03_prune_and_merge", "vit_nano_patch4_32"


@pytest.fixture
def brought(tmp_path):
    """(folder, photographs): 03 on a weights file without a classifier, and on twelve JPEGs without labels."""
    photographs, weights = tmp_path / "photographs", tmp_path / "mine.safetensors"
    photographs.mkdir()
    for number, pixels in enumerate(load_sample_images().images * 6):
        Image.fromarray(pixels[17 * number:17 * number + 211, 31:31 + 160 + 13 * number]).save(
            photographs / f"IMG_{number}.JPG", "JPEG")
    save_file(create_model(BACKBONE, num_classes=0).state_dict(), weights)
    score_tokens(open_model(weights, model=BACKBONE), photographs, tmp_path / "run" / "scores.safetensors", images=8,
                 config=RunConfig(workers=0, quiet=True, device="cpu"))
    lab.copies(tmp_path, tmp_path / "run", quick=True, more={
        NAME: {"checkpoint": str(weights), "model": BACKBONE, "data": str(photographs)}})
    return tmp_path, photographs


@pytest.mark.skipif(bool(lab.missing()), reason=lab.missing() or "-")
def test_an_explorer_answers_for_ones_own_weights_without_a_classifier_and_ones_own_photographs(brought):
    root, photographs = brought
    with lab.lab(root) as opened:
        opened.open(f"{NAME}.ipynb")
        cells = opened.run_all()
        assert not [f"{o.ename}: {o.evalue}" for cell in cells for o in cell.outputs if o.output_type == "error"]
        assert all(cell.execution_count for cell in cells)
        assert "cosine with the dense model's features" in opened.page.locator(".jp-Notebook").inner_text()
        assert opened.press(opened.slider("keep rate"), "ArrowLeft", 10)
        folder = opened.page.get_by_placeholder("path, Enter").first
        folder.fill(str(photographs))
        assert opened.press(folder, "Enter", 1)                 # the first of them is shown
        assert "photographs/IMG_0.JPG" in opened.page.locator(".jp-OutputArea select").first.inner_text()
        assert opened.press(opened.slider("block"), "ArrowRight", 1) and opened.errors == []
