"""How something runs: one small object, made once and handed on."""
from dataclasses import dataclass

from cyclopts import Parameter

from vitlab.runtime.kinds import Count, Dtype, Names, Seed, Workers
from vitlab.runtime.logs import check_loggers


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How a step runs; None: the step's own.

    Args:
        device: cpu or cuda (default: cuda where there is one)
        workers: loader processes (default: one a core, at most 8)
        seed: of all that is drawn
        batch_size: images at a time, instead of the step's own; of a training, its recipe's: lr scales along
        dtype: of the computation, instead of the step's own; float16 trains with loss scaling
        log: tensorboard, trackio, wandb: the numbers of a training, search or self-distillation go there too
        quiet: no progress bars, and no words on a model that is written
    """

    device: str | None = None
    workers: Workers | None = None
    seed: Seed = 0
    batch_size: Count | None = None
    dtype: Dtype | None = None
    log: Names | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        check_loggers(self.loggers)

    @property
    def loggers(self) -> tuple[str, ...]:
        """Those of `log`."""
        return tuple(self.log or ())

    @property
    def progress(self) -> bool:
        """Whether bars are shown."""
        return not self.quiet


def flags(*names: str, but: tuple[str, ...] = ()) -> Parameter:
    """Fields of a parameter's object are flags of their own: those named, or all but some."""
    return Parameter(name="*", parse=rf"^(config|changes|engine|{'|'.join(names)})$" if names
                     else rf"^(?!({'|'.join(but)})$)")


RUN = flags("device", "workers", "seed", "log", "quiet")
MEASURE = flags("device", "workers", "seed", "batch_size", "quiet")
