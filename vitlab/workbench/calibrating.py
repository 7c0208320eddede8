"""The step that refits a compressed model on a few images without labels: in closed form, then by a short self-distillation."""
from pathlib import Path

from torch import nn

from vitlab.criteria.compensation import RIDGE
from vitlab.models import compress, shape_of
from vitlab.plan import CompressionPlan
from vitlab.training import checkpoint
from vitlab.training.capture import need_classifier
from vitlab.training.checkpoint import Checkpoint
from vitlab.training.compensate import compensate
from vitlab.training.self_distillation import Divergence, self_distil
from vitlab.workbench.cutting import amp_of, open_dense
from vitlab.workbench.steps import Source, open_matching, pick_device


def calibrate(source: Source, data: str | Path, out: str | Path, plan: str | Path | CompressionPlan, *, images: int = 1000,
              ridge: float = RIDGE, minutes: float = 0, seed: int = 0, device: str | None = None,
              class_map: str | Path | None = None, workers: int | None = None, progress: bool = True) -> Checkpoint:
    """Compress a dense model by a plan, and bring its output near the dense one's on `images` of train, without labels: what is
    left of heads and neurons is refitted in closed form (`compensate`), then everything is trained for at most so many minutes
    (`self_distil`). Writes and returns the checkpoint in `out`; it is there after the closed form, and replaced by better ones.

    A tenth of the images is set apart (`ImageData.set_apart`): made_by says the mean KL(dense || compressed) in nats on it as
    kl_cut, kl_refitted and, with minutes, kl_distilled. Raises InputError for a model without a classifier, which has no such
    distance.
    """
    found, place = open_dense(source), pick_device(device)
    dense, amp = found.model.to(place), amp_of(found.model)
    need_classifier(dense, "calibrated models")
    opened = open_matching(data, found, class_map, labels=False).set_apart(images, seed)
    plan = plan if isinstance(plan, CompressionPlan) else CompressionPlan.load(plan, shape_of(dense))
    divergence = Divergence(dense, opened.batches("val", dense, workers=workers), amp)
    batches = list(opened.batches("train", dense, workers=workers))
    small = compensate(dense, plan, batches, ridge=ridge, amp=amp, progress=progress)
    made_by = {"step": "calibrate", "data": opened.name, "images": sum(map(len, opened.splits.values())), "ridge": ridge,
               "minutes": minutes, "seed": seed, "plan": plan.made_by, "kl_cut": divergence(compress(dense, plan)),
               "kl_refitted": divergence(small)}

    def keep(model: nn.Module, **more: float) -> None:
        checkpoint.save(Path(out) / checkpoint.FOLDER, model, plan, classes=found.info.get("classes"), made_by=made_by | more)
    keep(small)
    if minutes:
        self_distil(small, dense, opened, divergence, minutes=minutes, seed=seed, amp=amp, workers=workers, progress=progress,
                    on_better=lambda model, kl: keep(model, kl_distilled=kl))
    return checkpoint.load(out)
