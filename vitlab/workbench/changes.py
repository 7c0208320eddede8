"""What did compression break? One pass of a dense and a compressed model over images, kept in a file, and the pictures
that changed."""
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from vitlab.data import Images
from vitlab.data.scene_data import measuring_transform
from vitlab.measure.changes import Changes
from vitlab.measure.scene_changes import SceneChanges
from vitlab.models.opening import Source
from vitlab.models.segmenter import Segmenter
from vitlab.runtime.config import RunConfig
from vitlab.runtime.files import InputError
from vitlab.workbench.compared import Compared, ComparedScenes
from vitlab.workbench.steps import amp_of, open_dense, open_matching, open_model, pick_device

CHANGES = "changes.safetensors"


def what_changed(dense: Source, compressed: Source, data: str | Path, out: str | Path, *, images: int = 1000,
                 class_map: str | Path | None = None,
                 config: Annotated[RunConfig, Parameter(parse=False)] = RunConfig()) -> Compared:
    """Compare two models on so many images of the held-out split, or, of a folder without labels, of train's share to
    report on; the predictions are in out/changes.safetensors, of Segmenters counts of each image's pixels. Raises
    InputError for a model that was not made from one of the dense one's shape, a stream, or a model with other
    classes."""
    whole, found = open_dense(dense), open_model(compressed)
    if found.plan.shape != whole.plan.shape:
        raise InputError(f"the compressed model was made from one of another shape: {found.plan.shape}, and the dense "
                         f"one is {whole.plan.shape}")
    known = [names for each in (whole, found) if (names := each.info.get("classes"))]
    if len(known) == 2 and known[0] != known[1]:
        odd = next(pair for pair in zip(*known) if pair[0] != pair[1]) if len(known[0]) == len(known[1]) else "number"
        raise InputError(f"the two models have other classes ({odd}); one that was made from the other has its own")
    opened, device = open_matching(data, whole, class_map, labels=False), pick_device(config.device)
    split = opened.held_out if opened.has_held_out else "report"
    parts: Any = opened if opened.has_held_out else opened.parts(config.seed, report=images)
    if not isinstance(parts.split(split), Images):
        raise InputError(f"{opened.name}: a stream, whose images can't be looked at again; a folder's can")
    for each in (whole, found):
        each.model.to(device).eval()
    of_pixels = isinstance(whole.model, Segmenter)
    how: dict[str, Any] = {"whole": True, "batch_size": 1} if of_pixels else {}
    batches = parts.batches(split, whole.model, limit=min(images, len(parts.split(split))), seed=config.seed,
                            workers=config.workers, **how)
    changes = (SceneChanges if of_pixels else Changes).between(
        whole.model, found.model, batches, labelled=opened.has_held_out, amp=amp_of(whole.model),
        progress=config.progress)
    changes.save(Path(out) / CHANGES)
    seen, broken = batches.images, set(batches.broken)
    readable = type(seen)(seen.reader, [seen.indices[i] for i in range(len(seen)) if seen.path(i) not in broken])
    readable.transform, readable.channels = seen.transform, seen.channels
    if of_pixels:
        readable.transform = measuring_transform(whole.model)
    return (ComparedScenes if of_pixels else Compared)(
        dense=whole, compressed=found, images=readable, changes=changes,
        classes=_names(opened, whole.info.get("classes"), readable, changes),
        of=f"{len(readable)} images of {opened.name}, {split.replace('report', 'train, to report on')}")


def _names(opened: Any, known: list[str] | None, images: Images, changes: Any) -> dict[int, str]:
    """Class names by number: the model's, or the data set's; where its folders are mapped to numbers, those of the
    images that are there."""
    if known or opened.classes and not opened.mapped:
        return dict(enumerate(known or opened.classes))
    if not opened.mapped:
        return {}
    return {number: Path(images.path(i)).parent.name for i, number in enumerate(changes.targets.tolist())
            if number >= 0}
