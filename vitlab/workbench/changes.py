"""What did compression break? One pass of a dense model and of those made from it over images, kept in a file each, and
the pictures that changed."""
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from cyclopts import Parameter

from vitlab.data import Images
from vitlab.data.images import image_config
from vitlab.data.scene_data import measuring_transform
from vitlab.measure.changes import Changes, noted
from vitlab.measure.scene_changes import SceneChanges
from vitlab.models import encoder_of
from vitlab.models.checkpoint import Checkpoint
from vitlab.models.opening import Source
from vitlab.models.segmenter import Segmenter
from vitlab.runtime.config import RunConfig
from vitlab.runtime.files import InputError, require
from vitlab.training.loop import fingerprint
from vitlab.workbench.compared import Compared
from vitlab.workbench.compared_scenes import ComparedScenes
from vitlab.workbench.steps import amp_of, open_dense, open_matching, open_model, pick_device


def named(compressed: Source | Sequence[Source] | Mapping[str, Source]) -> dict[str, Source]:
    """{name: model} of one or several: as a mapping says, or by as much of the end of their paths as tells them apart.
    Raises InputError where nothing does."""
    if isinstance(compressed, Mapping):
        return dict(compressed)
    every: list[Any] = [*compressed] if isinstance(compressed, (list, tuple)) else [compressed]
    paths = [("compressed",) if isinstance(each, Checkpoint) else Path(str(each)).parts for each in every]
    for count in range(1, 1 + max(map(len, paths), default=0)):
        names = ["-".join(path[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return dict(zip(names, every))
    raise InputError(f"{len(every)} compressed models, of which two have one name, or none; {{name: model}} tells them "
                     f"apart")


def _check_made_from(whole: Checkpoint, found: Checkpoint, name: str) -> None:
    """InputError where a compressed model can't have been made from the dense one."""
    require(found.plan.shape == whole.plan.shape, f"{name}: the compressed model was made from one of another shape: "
                                                  f"{found.plan.shape}, and the dense one is {whole.plan.shape}")
    known = [names for each in (whole, found) if (names := each.info.get("classes"))]
    if len(known) == 2 and known[0] != known[1]:
        odd = next(pair for pair in zip(*known) if pair[0] != pair[1]) if len(known[0]) == len(known[1]) else "number"
        raise InputError(f"{name}: the two models have other classes ({odd}); one that was made from the other has its "
                         f"own")


def what_changed(dense: Source, compressed: Source | Sequence[Source] | Mapping[str, Source], data: str | Path,
                 out: str | Path, *, images: int = 1000, class_map: str | Path | None = None,
                 config: Annotated[RunConfig, Parameter(parse=False)] = RunConfig()) -> dict[str, Compared]:
    """Compare a model with one or several that were made from it (`named`) on so many images of the held-out split, or,
    of a folder without labels, of train's share to report on. The predictions are in out/NAME.safetensors, of
    Segmenters counts of each image's pixels; another call adds the models that are not there yet. Raises InputError for
    a model that was not made from one of the dense one's shape, a stream, or a model with other classes."""
    whole, models = open_dense(dense), {name: open_model(each) for name, each in named(compressed).items()}
    require("dense" not in models, "a compressed model is called dense; {name: model} gives it another name")
    for name, found in models.items():
        _check_made_from(whole, found, name)
    opened, device = open_matching(data, whole, class_map, labels=False), pick_device(config.device)
    split = opened.held_out if opened.has_held_out else "report"
    parts: Any = opened if opened.has_held_out else opened.parts(config.seed, report=images)
    if not isinstance(parts.split(split), Images):
        raise InputError(f"{opened.name}: a stream, whose images can't be looked at again; a folder's can")
    for each in (whole, *models.values()):
        each.model.to(device).eval()
    of_pixels = isinstance(whole.model, Segmenter)
    kind, how = (SceneChanges, {"whole": True, "batch_size": 1}) if of_pixels else (Changes, {})
    batches = parts.batches(split, whole.model, limit=min(images, len(parts.split(split))), seed=config.seed,
                            workers=config.workers, **how)
    files = {name: Path(out) / f"{name}.safetensors" for name in models}
    content = fingerprint([parts.files(split), images, config.seed, image_config(encoder_of(whole.model))],
                          [whole.model])
    inputs = {name: fingerprint([content, found.plan.to_json()], [found.model]) for name, found in models.items()}
    left = {name: found.model for name, found in models.items() if noted(files[name]).get("inputs") != inputs[name]}
    if left:
        made = kind.between(whole.model, left, batches, labelled=opened.has_held_out, amp=amp_of(whole.model),
                            progress=config.progress)
        for name, each in made.items():
            each.save(files[name], inputs=inputs[name], broken=json.dumps(sorted(batches.broken)))
    broken = {noted(path)["broken"] for path in files.values()}
    require(len(broken) == 1, f"{out}: other images could be read as some of the models were compared; remove it, to "
                              f"begin anew")
    gone, seen = set(json.loads(broken.pop())), batches.images
    readable = type(seen)(seen.reader, [seen.indices[i] for i in range(len(seen)) if seen.path(i) not in gone])
    readable.transform, readable.channels = seen.transform, seen.channels
    if of_pixels:
        readable.transform = measuring_transform(whole.model)
    found = {name: kind.load(path) for name, path in files.items()}
    classes = _names(opened, whole.info.get("classes"), readable, next(iter(found.values())))
    return {name: (ComparedScenes if of_pixels else Compared)(
        dense=whole, compressed=models[name], images=readable, changes=changes, classes=classes,
        of=f"{len(readable)} images of {opened.name}, {split.replace('report', 'train, to report on')}")
        for name, changes in found.items()}


def _names(opened: Any, known: list[str] | None, images: Images, changes: Any) -> dict[int, str]:
    """Class names by number: the model's, or the data set's; where its folders are mapped to numbers, those of the
    images that are there."""
    if known or opened.classes and not opened.mapped:
        return dict(enumerate(known or opened.classes))
    if not opened.mapped:
        return {}
    return {number: Path(images.path(i)).parent.name for i, number in enumerate(changes.targets.tolist())
            if number >= 0}


def overview(found: Mapping[str, Compared]) -> pd.DataFrame:
    """A line for the dense model, and for each that was compared with it."""
    lines = {name: each.rows()[1] for name, each in found.items()}
    first, *_ = found.values()
    columns = dict.fromkeys(column for line in lines.values() for column in line)
    return pd.DataFrame({"dense": first.rows()[0]} | lines, index=list(columns)).T.fillna("").rename_axis("model")


def pictures(found: Mapping[str, Compared], name: str) -> dict[str, list[int]]:
    """{which: numbers of images, the one that moved furthest in that model first}: of another class there, all, those
    that all compressed models have wrong, and those that it alone has wrong, the dense one and the others right; where
    nothing tells what is wrong, those that changed."""
    changes, every = found[name].changes, {each: one.changes.wrong() for each, one in found.items()}
    (before, own), others = every[name], [wrong for each, (_, wrong) in every.items() if each != name]
    shown = {"changed": changes.changed.numpy(), "all images": np.ones_like(own),
             f"{changes.fault} in all": np.all([own, *others], axis=0),
             f"{changes.fault} in this one only": own & ~np.any([before, *others], axis=0)}
    order = changes.distance.argsort(descending=True, stable=True).tolist()
    return {which: [i for i in order if there[i]] for which, there in shown.items()}
