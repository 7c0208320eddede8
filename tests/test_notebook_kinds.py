"""Notebooks on kinds of models that the demo has not, their cells run here, without a kernel: one that turns queries by
place and has gated neurons, one that pools by attention, and one without a classifier."""
import matplotlib
import pytest
from test_notebooks import code_cells

from vitlab.data.digits import CLASSES
from vitlab.models import checkpoint, shape_of
from vitlab.models.create import create_model
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.rules import Match
from vitlab.runtime.config import RunConfig
from vitlab.workbench import cutting, evaluating, notebooks, steps

matplotlib.use("agg")
QUIET = RunConfig(workers=0, quiet=True, device="cpu")
SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 36, "depth": 3, "num_heads": 3}
KINDS = {"RoPE and SwiGLU": ("vit_small_plus_patch16_dinov3", {"num_classes": 10, "init_values": 1.0}),
         "attention pooling": ("vit_base_patch16_siglip_224", {"num_classes": 10}),
         "no classifier": ("vit_small_patch14_dinov2", {"num_classes": 0, "init_values": 1.0})}


def ran(name: str, **parameters) -> dict:
    """What a notebook's cells leave, run one after the other, with these of its parameters."""
    path, left = notebooks.NOTEBOOKS / f"{name}.ipynb", {}
    notebooks.check_parameters(path, parameters)
    for cell in code_cells(path):
        exec(compile(cell.source, path.name, "exec"), left)
        if "parameters" in cell.metadata.get("tags", []):
            left |= parameters
    return left


@pytest.fixture(scope="module", params=KINDS)
def study(request, tmp_path_factory):
    """A folder with a dense model of a kind, one made from it by hand, and a row of each."""
    run, (name, args) = tmp_path_factory.mktemp("study"), KINDS[request.param]
    model = create_model(name, **SIZE, **args)
    protect = 0.1 if model.cls_token is not None else 0.0
    plan = CompressionPlan(shape=shape_of(model), blocks=(
        BlockPlan(heads=(0, 2)), BlockPlan(neurons=tuple(range(20)), tokens=Match(merged=6, protect=protect)),
        BlockPlan(tokens=Match(merged=0, protect=protect))))
    classes = list(CLASSES) if args["num_classes"] else None
    checkpoint.save(run / "dense" / checkpoint.FOLDER, model, CompressionPlan.empty(plan.shape), classes=classes)
    dense = steps.open_model(run / "dense")
    small, beside = cutting.apply_plan(dense, plan, run / "joint_finetuned"), evaluating.beside(dense)
    for called, found in (("dense", dense), ("small", small)):
        told = {"features": evaluating.Features(knn=True)} if beside and called == "dense" else {}
        steps.evaluate(found, "digits", name=called, images=40, out=run, config=QUIET, quick=True, **beside, **told)
    return request.param, run


def test_05_cuts_what_a_model_can_lose_and_says_why_not_the_rest(tmp_path, capsys):
    sizes = SIZE | {"depth_token_only": 1}
    model = create_model("cait_xxs24_224", num_classes=10, **sizes)
    checkpoint.save(tmp_path / "dense" / checkpoint.FOLDER, model, CompressionPlan.empty(shape_of(model)),
                    classes=list(CLASSES))
    left, said = ran("05_heads_and_neurons", run=str(tmp_path), quick=True), capsys.readouterr().out
    assert "heads of this model can't be cut: they are mixed" in said and "heads," not in said and "neurons, 3" in said
    assert all(block.heads is None and len(block.neurons) == 108 for block in left["small"].plan.blocks)    # of 144
    assert {row["dimension"] for row in left["rows"]} == {"neurons", "tokens"}


def test_10_deploys_it_and_says_its_classes(study, capsys):
    kind, run = study
    left = ran("10_deploy", run=str(run), quick=True, images=4, runtimes="torch")
    assert left["saved"] > 1 and left["about"]["verified"]["largest_difference"] < 1e-3
    assert ("no names of classes" in capsys.readouterr().out) == (kind == "no classifier")


def test_11_says_what_changed_and_in_a_line_what_it_cant(study, capsys):
    kind, run = study
    ran("11_what_changed", run=str(run), quick=True)
    said, drawn = capsys.readouterr().out, {path.stem for path in (run / "figures").glob("11_*.png")}
    bare = kind == "no classifier"
    assert ("another nearest image" in said) == ("can't be told" in said) == bare
    assert {*(f"11_{what}_joint_finetuned" for what in ("changed", "blocks", "tokens")), "11_similarity", "11_speed",
            "11_block_shares", "11_corruptions"} <= drawn
    assert ("11_reliability" in drawn) != bare


def test_90_compares_it_with_the_dense_model(study, capsys):
    kind, run = study
    ran("90_results", run=str(run), quick=True)
    said = capsys.readouterr().out
    what = "of distance" if kind == "no classifier" else "points of top-1"
    assert "fewer GMACs than dense" in said and what in said.split("small: ")[-1]
    assert (run / "figures" / "90_accuracy_cost.png").is_file()
