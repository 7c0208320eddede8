"""Which images of train serve which purpose: never one for two, or it is said."""
import itertools
import warnings

import pytest
import torch
from PIL import Image
from training_fixtures import tiny, write_grey

from vitlab.data import ImageData, open_data
from vitlab.data.images import Stream
from vitlab.data.parts import LEAST, SHARES, part, reported_on, share_of
from vitlab.runtime.files import InputError

ALL = dict.fromkeys(SHARES)


@pytest.mark.parametrize("total", [LEAST, 11, 97, 1009])
def test_the_shares_are_all_of_train_and_have_no_image_in_common(total):
    made = part(total, 3, ALL)
    assert sorted(itertools.chain(*made.indices.values())) == list(range(total)) and not made.said
    for role, share in SHARES.items():
        assert abs(len(made.indices[role]) - share * total) <= 1 and len(made.indices[role]) >= 1
    assert part(total, 4, ALL) != made == part(total, 3, ALL)


@pytest.mark.parametrize("total", [40, 97, 1009])
def test_commands_agree_without_knowing_each_others_numbers(total):
    """Whatever each asks for, alone or together with others: what is chosen or reported on serves nothing else."""
    wanted = {"score": (5, 17, 512, None), "calibrate": (3, 29, 1000, None), "choose": (2, 256, None),
              "report": (2, 256, None)}
    sets = {role: [set(part(total, 1, {role: limit}).indices[role]) for limit in limits] for role,
            limits in wanted.items()}
    for a, b in itertools.combinations(sets, 2):
        for one, other in itertools.product(sets[a], sets[b]):
            assert not one & other or {a, b} == {"score", "calibrate"}
    together = part(total, 1, {"score": 5, "choose": 2, "report": 2}).indices
    assert all(set(own) <= sets[role][0] for role, own in together.items())


def test_scores_are_of_the_first_images_of_the_permutation():
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(5)).tolist()
    assert part(1000, 5, {"score": 300}).indices["score"] == order[:300]
    assert part(1000, 5, {"report": 99}).indices["report"] == order[850:949]


def test_scores_and_refits_go_on_into_each_others_share_only_where_theirs_is_short_and_say_so():
    made = part(1000, 0, {"score": 512, "calibrate": 188})
    # 700 are enough
    assert len(made.indices["score"]) == 512 and not set(made.indices["score"]) & set(made.indices["calibrate"])
    assert made.said == ("score takes 512 images, 162 of them from the share of calibrate",)
    both = part(1000, 0, {"score": 512, "calibrate": 1000})
    assert len(set(both.indices["score"])
               & set(both.indices["calibrate"])) == 512 and len(both.indices["calibrate"]) == 700
    assert both.said[1:] == ("calibrate takes 700 images of the 1000 asked for, 350 of them from the share of score",)


def test_what_is_chosen_or_reported_on_takes_from_nobody_and_says_that_it_has_fewer():
    made = part(100, 0, {"choose": 256, "report": 15})
    assert [len(own) for own in made.indices.values()] == [15, 15]
    assert made.said == ("choose takes 15 images of the 256 asked for",)


def test_too_few_images_are_shared_and_it_is_said():
    made = part(LEAST - 1, 0, {"score": 512, "choose": 3})
    assert sorted(made.indices["score"]) == list(range(LEAST - 1)) and made.indices["choose"] == made.indices["score"][
        :3]
    assert made.said == ("score, choose share the same images, which are too few to be divided",)


# ---------------------------------------------------------------- of a data set

def paths(data: ImageData, role: str) -> set[str]:
    return {data.split(role).path(i) for i in range(len(data.split(role)))}


def test_parts_of_a_folder_without_labels_are_of_train_and_counted(tmp_path):
    for number in range(40):
        write_grey(tmp_path / f"{number:02d}.png", number)
    data = open_data(tmp_path)
    with pytest.warns(UserWarning, match=r"train has 40 images; score takes 20 images, 6 of them from the share of "
                                         r"calibrate$") as said:
        parts = data.parts(1, score=20, choose=5, report=6)
    assert len(said) == 1 and parts.roles == {"score": 20, "choose": 5, "report": 6, "shared": [
        "score takes 20 images, 6 of them from the share of calibrate"]}
    found = [paths(parts, role) for role in ("score", "choose", "report")]
    assert len(set.union(*found)) == 31 and not parts.labelled and set(data.splits) == {"train"} and not data.roles
    assert sum(len(x) for x, _ in parts.batches("choose", tiny(), workers=0)) == 5
    with pytest.raises(InputError, match="no split 'train'; it has .'choose', 'report', 'score'"):
        parts.split("train")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data.parts(1).roles == {"score": 14, "calibrate": 14, "choose": 6, "report": 6}


def test_unknown_roles_and_no_image_are_refused():
    data = open_data("digits")
    with pytest.raises(InputError, match="role 'judge' is not known; known are .*'score', 'calibrate', 'choose', "
                                         "'report'"):
        data.parts(judge=3)
    with pytest.raises(InputError, match="choose: limit is 0; at least 1"):
        data.parts(choose=0)


def test_the_first_images_of_a_stream_serve_every_role_and_it_is_said():
    class Endless(torch.utils.data.IterableDataset):
        transform = None

        def __iter__(self):
            for number in range(100):
                yield self.transform(Image.new("RGB", (32, 32), (number, 0, 0))), number % 3
    data = ImageData("shards", {"train": Stream(lambda **settings: Endless())}, None, None)
    with pytest.warns(UserWarning, match="shards: train; of a stream, the first images serve every role"):
        parts = data.parts(score=20, choose=10)
    assert parts.roles["score"] == 20 and parts.roles["choose"] == 10 and parts.roles["shared"]
    assert reported_on(data.parts(report=10).roles) == "on up to 10 images, which it was chosen on too"
    counts = [sum(len(x) for x, _ in parts.batches(role, tiny(), batch_size=10, workers=0))
              for role in ("score", "choose")]
    assert counts == [20, 10]


def test_what_is_reported_on_is_said_to_be_other_images_only_where_it_is(tmp_path):
    for number in range(LEAST):
        write_grey(tmp_path / f"{number}.png", number)
    assert reported_on(open_data(tmp_path).parts(choose=1, report=1).roles) == "on 1 other images"
    (tmp_path / "0.png").unlink()
    with pytest.warns(UserWarning, match="too few"):
        roles = open_data(tmp_path).parts(choose=9, report=9).roles
    assert reported_on(roles) == f"on {LEAST - 1} images, which it was chosen on too"


def test_a_share_is_a_run_of_places():
    assert [share_of(1000, role) for role in SHARES] == [range(350), range(350, 700), range(700, 850), range(850, 1000)]
