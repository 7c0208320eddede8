"""The token map: what it shows against the plan, the cost module and slow loops; and files that strangers upload."""
import base64
import datetime
import io
import re
import struct
import zlib

import numpy as np
import pytest
import registry
import torch
from matplotlib import pyplot as plt
from PIL import Image

from vitlab.criteria.planning import prune_and_merge
from vitlab.measure.capture import token_places
from vitlab.models import compress, shape_of
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.cost import gmacs
from vitlab.plan.rules import Match, Select
from vitlab.plan.shape import ViTShape
from vitlab.plots.tokens import bordered, through_matrices, through_means, tinted
from vitlab.runtime.files import InputError
from vitlab.workbench.explore import choosing
from vitlab.workbench.explore.choosing import PictureChooser
from vitlab.workbench.explore.maps import GIVEN, selected
from vitlab.workbench.explore.token_map import BLOCKS, PICTURES, TokenMap, token_map
from vitlab.workbench.pictures import as_input

CENTER, MERGE, SHARE = "Prune and Merge, one budget for all", "Prune and Merge, a budget per block", "shared updates"
MATCH, SELECT = "merging by content", "selection"
BY_PLACE = {CENTER: {"rule": "center"}, MERGE: {"rule": "merge"}, SHARE: {"rule": "center", "share": True}}
ROUNDING = 0.5 / 255 + 1e-9                     # of a PNG
# RoPE with SwiGLU; attention pooling; no classifier: (timm's name, classes)
KINDS = (("vit_small_plus_patch16_dinov3", 7), ("vit_base_patch16_siglip_224", 7), ("vit_small_patch14_dinov2", 0))
SHAPE = ViTShape(img_size=(20, 30), patch_size=(10, 10), embed_dim=8, depth=2, num_heads=2, head_dim=4, num_neurons=16)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3) of the values that a PNG can hold."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)) / 255


def shown(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png))) / 255


def saved(picture: np.ndarray, kind: str = "PNG", **settings) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((picture * 255).round().astype(np.uint8)).save(buffer, format=kind, **settings)
    return buffer.getvalue()


def costs(line: str) -> tuple[float, float, float]:
    """(GMACs, of the dense model, ratio) that the line says."""
    return tuple(map(float, re.search(r"Whole model: ([\d.e-]+) of ([\d.e-]+) GMACs, ratio ([\d.]+)\.", line).groups()))


def scores_of(shape: ViTShape) -> torch.Tensor:
    return torch.rand(shape.depth, shape.num_patches, generator=torch.Generator().manual_seed(0)) + 0.1


@pytest.fixture
def dense(tiny_vit):
    return tiny_vit("deit")                     # 3 x 5 patches of 16: pictures of 192 x 320


@pytest.fixture
def pictures():
    return {"noise": noise(192, 320), "other": noise(61, 37, seed=1)}


@pytest.fixture
def explorer(dense, pictures):
    return token_map(dense, pictures, scores_of(shape_of(dense)), keep_rate=0.6, prune_rate=0.2)


def matched(shape: ViTShape, keep_rate: float) -> CompressionPlan:
    """What the matching rule should do: an equal ratio in the middle half of five blocks, which is the blocks 1 and
    2."""
    left, blocks = shape.num_patches, [BlockPlan()]
    for _ in range(2):
        merged = min(left - int(left * keep_rate ** 0.5), left // 2)
        blocks.append(BlockPlan(tokens=Match(merged=merged)))
        left -= merged
    return CompressionPlan(shape=shape,
                           blocks=(*blocks, BlockPlan(tokens=Match(merged=0)), BlockPlan(tokens=Match(merged=0))))


@pytest.mark.parametrize("rule", [CENTER, MERGE, SHARE, MATCH])
def test_moving_the_keep_rate_changes_the_picture_and_the_costs_to_those_of_the_plan(dense, explorer, rule):
    shape, seen = shape_of(dense), set()
    explorer.rule.value, explorer.block.value = rule, 2
    for keep_rate in (0.9, 0.5, 0.3):
        explorer.keep_rate.value = keep_rate
        plan = matched(shape, keep_rate) if rule == MATCH else prune_and_merge(
            scores_of(shape), shape, keep_rate=keep_rate, prune_rate=0.2, **BY_PLACE[rule])
        whole = gmacs(CompressionPlan.empty(shape))
        # 3 digits
        assert costs(explorer.line.value) == pytest.approx((gmacs(plan), whole, gmacs(plan) / whole), rel=1e-3)
        assert f"{plan.flows()[2].attended} " in explorer.line.value and gmacs(plan) < whole
        seen.add(explorer.right.picture)
    assert len(seen) == 3


@pytest.mark.parametrize("rule", [CENTER, MERGE, SHARE])
def test_groups_are_the_regions_of_the_plan_in_every_block_and_the_pruned_are_orange(dense, explorer, rule):
    shape = shape_of(dense)
    plan = prune_and_merge(scores_of(shape), shape, keep_rate=0.6, prune_rate=0.2, **BY_PLACE[rule])
    explorer.rule.value = rule
    for block, cut in enumerate(plan.blocks):
        explorer.block.value = block
        regions = list(range(15)) if cut.tokens is None else list(cut.tokens.regions)
        assert explorer.left.groups == explorer.right.groups == regions
        drawn, picture = shown(explorer.left.picture), explorer.chooser.picture.repeat(2, 0).repeat(2, 1)
        for j in range(15):
            # borders left out
            inside = np.s_[j // 5 * 128 + 5:j // 5 * 128 + 123, j % 5 * 128 + 5:j % 5 * 128 + 123]
            is_pruned = cut.tokens is not None and j in cut.tokens.pruned
            assert np.allclose(drawn[inside], picture[inside], atol=ROUNDING) is not is_pruned
            assert ("pruned" in explorer.left.labels[j]) is is_pruned
            assert is_pruned or regions.count(
                regions[j]) == 1 or f"one token of {regions.count(regions[j])} p" in explorer.left.labels[j]


def test_groups_of_merging_by_content_are_the_places_that_the_model_gives_the_chosen_picture(dense, explorer):
    explorer.rule.value, explorer.keep_rate.value = MATCH, 0.5
    small, found = compress(dense, matched(shape_of(dense), 0.5)), set()
    for name in ("noise", "other"):
        explorer.chooser.names.value = name
        places = token_places(small, as_input(explorer.chooser.picture, dense))
        for block in range(5):
            explorer.block.value = block
            assert explorer.left.groups == (places[block][0].tolist() if block else list(range(15)))
        found.add(tuple(explorer.left.groups))
    assert len(found) == 2                      # each picture has its own


@torch.no_grad()
def test_selected_tokens_are_those_of_the_class_tokens_attention_and_shares_those_of_nested_means(dense, images):
    shape, x = shape_of(dense), images(dense, 1)
    kept = {1: 9, 3: 4}
    small = compress(dense, CompressionPlan(shape=shape, blocks=tuple(
        BlockPlan(tokens=Select(kept=kept[i]) if i in kept else None) for i in range(5))))
    found = selected(small, x, shape)
    assert list(found) == [1, 3]
    # share of patches, per token
    rows, held = small.norm_pre(small._pos_embed(small.patch_embed(x))), [{j: 1.0} for j in range(15)]
    for index, block in enumerate(small.blocks):
        if index in kept:
            attn, normed = block.block.attn, block.block.norm1(rows)[0]
            q, k, _ = (normed @ attn.qkv.weight.T + attn.qkv.bias).reshape(len(normed), 3, attn.num_heads,
                                                                           attn.head_dim).unbind(1)
            rank = sum(((q[0, h] @ k[:, h].T) / attn.head_dim ** 0.5).softmax(0)
                       for h in range(attn.num_heads))[1:].tolist()
            order = sorted(range(len(held)), key=lambda j: -rank[j])
            rest = [held[j] for j in order[kept[index]:]]
            held = [held[j]
                    for j in order[:kept[index]]] + [{p: s / len(rest) for each in rest for p, s in each.items()}]
            wanted = torch.tensor([[each.get(p, 0.0) for p in range(15)] for each in held])
            torch.testing.assert_close(found[index], wanted, atol=1e-6, rtol=0)         # float32 sums of a few ones
        rows = block(rows)


def test_what_is_averaged_by_selection_is_one_group_and_orange(explorer):
    explorer.rule.value, explorer.keep_rate.value, explorer.block.value = SELECT, 0.3, 4
    groups = explorer.left.groups
    large = [group for group in set(groups) if groups.count(group) > 1]
    assert len(large) == 1 and f"{groups.count(large[0])} patches averaged into one token" in explorer.line.value
    assert "pruned" not in explorer.line.value


@pytest.mark.parametrize("rule", [CENTER, MERGE])
def test_the_right_picture_is_through_the_matrices_of_the_plan(dense, explorer, rule):
    shape = shape_of(dense)
    explorer.rule.value, explorer.block.value = rule, 1
    plan = prune_and_merge(scores_of(shape), shape, keep_rate=0.6, prune_rate=0.2, **BY_PLACE[rule])
    _, back = through_matrices(noise(192, 320), plan.blocks[1].tokens, shape)
    np.testing.assert_allclose(shown(explorer.right.picture), back, atol=ROUNDING)


@pytest.mark.parametrize("rule", [SHARE, MATCH])
def test_the_right_picture_without_matrices_has_every_patch_as_the_mean_of_its_token(dense, explorer, rule):
    explorer.rule.value, explorer.block.value, explorer.keep_rate.value = rule, 2, 0.4
    picture, groups = noise(192, 320), explorer.left.groups
    cut = prune_and_merge(scores_of(shape_of(dense)), shape_of(dense), keep_rate=0.4, prune_rate=0.2,
                          share=True).blocks[2].tokens
    patch = [picture[j // 5 * 64:, j % 5 * 64:][:64, :64] for j in range(15)]
    for j in range(15):
        same = [i for i in range(15) if groups[i] == groups[j]] if groups[j] >= 0 else [j]
        share = [cut.weights[i] for i in same] if rule == SHARE and groups[j] >= 0 else [1 / len(same)] * len(same)
        mean = sum(weight * patch[i] for weight, i in zip(share, same))
        np.testing.assert_allclose(shown(explorer.right.picture)[j // 5 * 64:, j % 5 * 64:][:64, :64], mean,
                                   atol=ROUNDING)


@pytest.mark.parametrize("rule", [CENTER, MERGE, SHARE, MATCH, SELECT])
def test_the_neutral_rates_show_the_picture_itself_at_the_dense_cost(explorer, rule):
    explorer.rule.value, explorer.keep_rate.value, explorer.prune_rate.value = rule, 1.0, 0.0
    for block in (0, 4):
        explorer.block.value = block
        np.testing.assert_allclose(shown(explorer.right.picture), noise(192, 320), atol=ROUNDING)
        assert explorer.left.groups == list(range(15)) and costs(explorer.line.value)[2] == 1


def test_every_rule_takes_every_rate_of_the_sliders(tiny_vit, family, pictures, monkeypatch):
    monkeypatch.setattr(TokenMap, "told", lambda self: {})                      # another test's matter
    dense = tiny_vit(family)
    explorer = token_map(dense, pictures, scores_of(shape_of(dense)))
    assert explorer.rule.options == (CENTER, MERGE, SHARE, MATCH, SELECT)
    for rule in explorer.rule.options:
        explorer.rule.value = rule
        for keep_rate in (explorer.keep_rate.min, 0.5, 1.0):
            for prune_rate in (0.0, 0.5, explorer.prune_rate.max):
                explorer.keep_rate.value, explorer.prune_rate.value = keep_rate, prune_rate
                # folded matrices cost, too
                assert costs(explorer.line.value)[2] <= (1.2 if rule in (CENTER, MERGE) else 1.05)
                assert len(explorer.left.groups) == shape_of(dense).num_patches


def test_both_models_say_what_they_take_the_picture_for_as_the_slider_moves(dense, explorer):
    explorer.rule.value = MATCH
    for keep_rate in (1.0, 0.3):
        explorer.keep_rate.value = keep_rate
        model, x = explorer.maps.compressed(*explorer.key()), as_input(explorer.chooser.picture, dense)
        for name, of in (("dense", dense), ("compressed", model)):
            with torch.no_grad():
                p, numbers = of(x)[0].softmax(dim=0).sort(descending=True)
            said = explorer.told()[name]
            assert [label for label, _ in said] == [f"class {i}" for i in numbers[:3].tolist()]
            assert [value for _, value in said] == pytest.approx(p[:3].tolist(), rel=1e-4)          # float32
            assert f"<td>{name}</td><td>class {numbers[0]} {p[0]:.2f}</td>" in explorer.says.value
    assert explorer.told()["dense"] != explorer.told()["compressed"]


def test_all_blocks_of_a_picture_or_a_block_of_all_pictures_are_shown_and_chosen(dense, explorer, pictures):
    assert explorer.tiles.layout.display == "none"
    explorer.rule.value, explorer.view.value = MATCH, BLOCKS
    assert explorer.tiles.layout.display is None
    blocks = [seen.regions.max() + 1 for _, seen in explorer.several().values()]
    flows = explorer.maps.plan(*explorer.key()).flows()[:-1]                    # the last reads out
    assert blocks[:-1] == [flow.after - shape_of(dense).num_prefix_tokens for flow in flows]
    figure = explorer.figure()
    assert [axis.get_title() for axis in figure.axes[:3]] == ["picture", *list(explorer.several())[:2]]
    explorer.tiles.picked = 1
    assert explorer.block.value == 1
    before, explorer.view.value = explorer.tiles.picture, PICTURES
    assert list(explorer.several()) == list(pictures) and explorer.tiles.picture != before
    explorer.tiles.picked = len(pictures) - 1
    assert explorer.chooser.chosen == list(pictures)[-1]
    assert len(explorer.figure().axes) >= 2 * len(pictures)
    plt.close("all")


def test_without_scores_there_are_the_rules_that_need_none_and_without_a_class_token_no_selection(tiny_vit, pictures):
    assert token_map(tiny_vit("deit"), pictures).rule.options == (MATCH, SELECT)
    explorer = token_map(tiny_vit("augreg", class_token=False, global_pool="avg"), pictures)
    assert explorer.rule.options == (MATCH,)
    explorer.keep_rate.value, explorer.block.value = 0.3, 4
    assert 0 < costs(explorer.line.value)[2] < 1 and len(set(explorer.left.groups)) < 21


def test_a_given_plan_is_shown_first_and_its_rates_can_not_be_moved(dense, pictures):
    plan = matched(shape_of(dense), 0.4)
    explorer = token_map(dense, pictures, scores_of(shape_of(dense)), plan)
    assert explorer.rule.value == GIVEN and explorer.keep_rate.disabled and explorer.prune_rate.disabled
    assert costs(explorer.line.value)[0] == pytest.approx(gmacs(plan), rel=6e-4)       # 4 digits
    explorer.rule.value = MATCH
    assert not explorer.keep_rate.disabled and explorer.prune_rate.disabled
    explorer.rule.value = CENTER
    assert not explorer.keep_rate.disabled and not explorer.prune_rate.disabled


def test_every_block_of_a_span_shows_the_tokens_that_stay_merged_and_the_picture_through_the_matrices(dense, pictures):
    shape = shape_of(dense)
    plan = prune_and_merge(scores_of(shape), shape, spans=[(1, 3, 0.5)], prune_rate=0.2)
    explorer, shown = token_map(dense, pictures, scores_of(shape), plan), []
    for block in range(5):
        explorer.block.value = block
        shown.append((tuple(explorer.left.groups), explorer.right.picture, len(explorer.figure().axes)))
    assert shown[1] == shown[2] == shown[3] and shown[1][0] == plan.blocks[1].tokens.regions
    assert shown[0] == shown[4] and shown[0][0] == tuple(range(15)) and shown[0][2] != shown[1][2]


def test_what_does_not_fit_is_refused_before_a_widget_is_shown(tiny_vit, dense, pictures):
    shape = shape_of(dense)
    with pytest.raises(InputError, match="already compressed"):
        token_map(compress(dense, matched(shape, 0.5)), pictures)
    with pytest.raises(InputError, match="for another model"):
        token_map(dense, pictures, plan=CompressionPlan.empty(shape_of(tiny_vit("augreg"))))
    with pytest.raises(InputError, match=r"token scores are \(5, 14\)"):
        token_map(dense, pictures, scores_of(shape)[:, 1:], CompressionPlan.empty(shape))
    with pytest.raises(InputError, match="boundary 'round' is not known"):
        token_map(dense, pictures, scores_of(shape), CompressionPlan.empty(shape), boundary="round")
    with pytest.raises(InputError, match="no picture"):
        token_map(dense, {})


@pytest.mark.parametrize("rule, panels", [(CENTER, 3), (MATCH, 2)])
def test_the_representation_holds_the_widget_and_a_figure_of_its_state(explorer, rule, panels):
    explorer.rule.value, explorer.block.value = rule, 3
    bundle = explorer._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == explorer.model_id
    assert Image.open(io.BytesIO(base64.b64decode(bundle["image/png"]))).width > 500
    figure = explorer.figure()
    texts = figure._supxlabel.get_text().replace("\n", " ")
    assert len(figure.axes) == panels and explorer.line.value in texts and rule in texts
    assert any("block 3" in axis.get_title() + axis.get_ylabel() for axis in figure.axes)


def test_a_patch_that_is_picked_on_one_picture_is_picked_on_the_other(explorer):
    explorer.right.picked = 7
    assert explorer.left.picked == 7
    assert explorer.left.alt != explorer.right.alt and "block 2" in explorer.left.alt and "noise" in explorer.right.alt


# ---- Choosing a picture

@pytest.fixture
def chooser(pictures):
    return PictureChooser(pictures, SHAPE)      # pictures of 220 x 330


def upload(chooser: PictureChooser, name: str, content: bytes) -> None:
    chooser.upload.value = ({"name": name, "type": "", "size": len(content), "content": memoryview(content),
                             "last_modified": datetime.datetime.now(datetime.timezone.utc)},)


def claiming(width: int, height: int) -> bytes:
    """A PNG of one pixel whose header says that it is larger."""
    png = bytearray(saved(noise(1, 1)))
    png[16:24] = struct.pack(">II", width, height)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    return bytes(png)


@pytest.mark.parametrize("name, content, said", [
    ("cut.png", saved(noise(61, 37))[:200], "can't be read as an image"),
    ("words.png", b"no image at all", "can't be read as an image"),
    ("program.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "can't be read as an image"),
    ("other.ppm", saved(noise(11, 13), "PPM"), "can't be read as an image"),   # which Pillow could
    ("large.png", saved(noise(11, 13)) + bytes(choosing.MAX_BYTES), "more than 10 MB"),
    ("bomb.png", claiming(10007, 10009), "more than 89 megapixels"),           # a warning of Pillow's
    ("greater.png", claiming(100003, 100019), "more than 89 megapixels"),      # an error of Pillow's
    ("<b>.png", b"", "can't be read as an image"),
])
def test_an_upload_that_can_not_be_read_is_refused_in_a_line_and_the_picture_stays(chooser, name, content, said):
    upload(chooser, name, content)
    line = chooser.message.value.replace("&#x27;", "'").replace("&lt;", "{").replace("&gt;", "}")
    assert line.startswith(name.replace("<",
                                        "{").replace(">",
                                                     "}")) and said in line and "<" not in line and "\n" not in line
    assert chooser.chosen == chooser.names.value == "noise" and len(chooser.names.options) == 2
    upload(chooser, "good.png", saved(noise(220, 330, seed=2)))
    assert chooser.message.value == "" and chooser.chosen == chooser.names.value
    np.testing.assert_array_equal(chooser.picture, noise(220, 330, seed=2))


def test_two_uploads_of_one_name_are_two_pictures(chooser):
    for seed in (2, 3):
        upload(chooser, "same.png", saved(noise(220, 330, seed)))
        np.testing.assert_array_equal(chooser.picture, noise(220, 330, seed))
    assert len(chooser.names.options) == 4


def test_an_upload_is_what_the_explorer_shows(explorer):
    explorer.block.value = 0
    upload(explorer.chooser, "mine.png", saved(noise(192, 320, seed=5)))
    explorer.keep_rate.value, explorer.prune_rate.value = 1.0, 0.0
    np.testing.assert_allclose(shown(explorer.right.picture), noise(192, 320, seed=5), atol=ROUNDING)


def test_a_photograph_taken_sideways_is_shown_upright_and_its_middle_is_cut_out(chooser):
    grey = np.linspace(0, 1, 220)[:, None, None] * np.ones((1, 330, 3))         # dark above, bright below
    turned = Image.Exif()
    turned[0x0112] = 6                                                          # "turn me clockwise to see me upright"
    upload(chooser, "turned.png", saved(np.rot90(grey), exif=turned))
    np.testing.assert_allclose(chooser.picture, grey, atol=ROUNDING)
    wide = np.concatenate([np.zeros((220, 110, 3)), grey, np.zeros((220, 110, 3))], axis=1)
    upload(chooser, "wide.png", saved(wide))
    np.testing.assert_allclose(chooser.picture, grey, atol=ROUNDING)


def test_the_images_of_a_folder_and_of_its_folders_are_offered_and_a_broken_one_leaves_the_picture(chooser, tmp_path):
    (tmp_path / "cats").mkdir()
    (tmp_path / "a2.png").write_bytes(saved(noise(220, 330, seed=2)))
    (tmp_path / "a10.png").write_bytes(b"broken")
    (tmp_path / "cats" / "c.jpg").write_bytes(saved(noise(31, 17), "JPEG"))
    (tmp_path / "notes.txt").write_text("no image")
    chooser.folder.value = str(tmp_path)
    labels = [label for label, _ in chooser.names.options]
    # 2 before 10
    assert labels == [f"{tmp_path.name}/a2.png", f"{tmp_path.name}/a10.png", "cats/c.jpg", "noise", "other"]
    assert chooser.names.label == labels[0]
    np.testing.assert_array_equal(chooser.picture, noise(220, 330, seed=2))
    chooser.names.label = labels[1]
    assert "a10.png: can&#x27;t be read" in chooser.message.value and chooser.names.label == labels[0]
    np.testing.assert_array_equal(chooser.picture, noise(220, 330, seed=2))
    chooser.names.label = labels[2]
    assert chooser.message.value == "" and chooser.picture.shape == (220, 330, 3)
    (tmp_path / "a10.png").unlink()
    chooser.names.label = labels[1]
    assert "a10.png: can&#x27;t be read (No such file" in chooser.message.value and chooser.names.label == labels[2]


def test_the_folder_of_a_data_set_and_a_single_image_are_taken_too_and_a_relative_path_is_said_in_full(chooser,
                                                                                                       tmp_path,
                                                                                                       monkeypatch):
    deep = tmp_path / "val" / "cats" / "c.png"
    deep.parent.mkdir(parents=True)
    deep.write_bytes(saved(noise(220, 330, seed=2)))
    for given in (tmp_path, deep):
        chooser.names.label = "noise"
        chooser.folder.value = str(given)
        assert [label for label,
                _ in chooser.names.options] == ["cats/c.png", "noise", "other"] and chooser.names.label == "cats/c.png"
    monkeypatch.chdir(tmp_path)
    chooser.folder.value = "vall"
    assert f"{tmp_path / 'vall'}: no such folder" in chooser.message.value


@pytest.mark.parametrize("folder", ["/no/such/folder", "~nobody-at-all/x", "empty"])
def test_a_folder_without_images_is_said_and_nothing_changes(chooser, tmp_path, folder):
    (tmp_path / "empty").mkdir()
    chooser.folder.value = str(tmp_path / "empty") if folder == "empty" else folder
    assert "no such folder, or no image in it" in chooser.message.value
    assert chooser.chosen == "noise" and len(chooser.names.options) == 2


def test_only_so_many_images_of_a_folder_are_offered(chooser, tmp_path, monkeypatch):
    monkeypatch.setattr(choosing, "MAX_LISTED", 3)
    for j in range(5):
        (tmp_path / f"{j}.png").write_bytes(saved(noise(11, 13, j)))
    chooser.folder.value = str(tmp_path)
    assert len(chooser.names.options) == 3 + 2


# ---- Drawing

def test_borders_are_drawn_where_regions_change_and_nowhere_else():
    regions, image = np.array([0, 0, 1, 2, 1, 1]), np.full((20, 30, 3), 0.5)
    drawn = bordered(image, regions, SHAPE)
    assert (drawn[3, 9:11] == 0.5).all() and (drawn[15, 19:21] == 0.5).all()    # inside a region
    for row, left in ((3, 19), (15, 9)):                                        # between the columns of one row
        np.testing.assert_array_equal(drawn[row, left - 1:left + 4, 0], [0.5, 0, 1, 0, 0.5])
    np.testing.assert_array_equal(drawn[8:13, 3, 0], [0.5, 0, 1, 0, 0.5])       # 0 above 2
    np.testing.assert_array_equal(drawn[8:13, 25, 0], [0.5] * 5)                # 1 above 1


def test_only_the_patches_named_are_tinted_and_toward_orange():
    drawn = tinted(np.full((20, 30, 3), 0.5), np.array([False, True, False, False, False, True]), SHAPE)
    changed = (drawn != 0.5).any(axis=2)
    wanted = np.zeros((20, 30), dtype=bool)
    wanted[:10, 10:20] = wanted[10:, 20:] = True
    np.testing.assert_array_equal(changed, wanted)
    red, green, blue = drawn[0, 10]
    assert red > 0.5 > blue and red > green > blue


def test_means_of_no_region_at_all_are_the_image():
    image = noise(20, 30)
    np.testing.assert_allclose(through_means(image, torch.full((6,), -1), torch.zeros(6), SHAPE), image, atol=1e-12)


@pytest.mark.parametrize("name, classes", KINDS)
def test_each_kind_of_model_has_the_rules_that_its_plans_may_have_and_all_of_them_can_be_seen(name, classes):
    model = registry.tiny(name, "cpu")
    model.reset_classifier(classes)
    shape = shape_of(model)
    explorer = token_map(model, {"noise": noise(160, 200)}, scores_of(shape))
    assert (SELECT in explorer.rule.options) is (shape.class_token and not shape.rotary)
    for rule in explorer.rule.options:
        explorer.rule.value, seen = rule, set()
        for keep_rate in (1.0, 0.4):
            explorer.keep_rate.value = keep_rate
            seen.add(costs(explorer.line.value))
        assert len(seen) == 2
    assert explorer._repr_mimebundle_()["image/png"]


def test_a_model_whose_tokens_cannot_be_cut_has_no_token_map():
    with pytest.raises(InputError, match=r"tokens of this model can't be cut: \w+"):
        token_map(registry.tiny("beit_base_patch16_224", "cpu"), {"noise": noise(160, 200)})
