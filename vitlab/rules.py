"""Token rules: how a block's tokens are taken in and given back, as checked plain data. One small class a rule."""
from dataclasses import dataclass

from vitlab.shape import ViTShape, is_int, require

LARGEST = 3e38                              # of a float32


@dataclass(frozen=True, kw_only=True)
class MergeReconstruct:
    """Token rule of Prune and Merge: merge before the block, reconstruct after it (methods A4 to A6).

    The numbers are the matrices' starting values; trained matrices are weights and live in the checkpoint.
    """

    regions: tuple[int, ...]            # per patch: which merged token it goes into, from 0; -1: none (pruned patches only)
    weights: tuple[float, ...]          # per patch: its entry in the merge matrix; 0 where pruned
    pruned: tuple[int, ...] = ()        # patches that skip the block, ascending
    trains: str = "both"                # "both" matrices or "reconstruct" alone

    kind = "merge_reconstruct"

    def __post_init__(self) -> None:
        n, pruned = len(self.regions), set(self.pruned)
        require(n == len(self.weights), f"{n} regions but {len(self.weights)} weights; one of each per patch is needed")
        require(all(is_int(r) and r >= -1 for r in self.regions), "regions must be integers of at least -1")
        require(all(isinstance(w, (int, float)) and not isinstance(w, bool) and abs(w) < LARGEST
                     for w in self.weights), "weights must be finite numbers")
        require(all(is_int(j) and 0 <= j < n for j in self.pruned) and list(self.pruned) == sorted(pruned),
                 f"pruned must be patches from 0 to {n - 1}, ascending without repeats")
        require(set(self.regions) - {-1} == set(range(self.num_merged)),
                 f"regions must be numbered 0 to {self.num_merged - 1} without a gap")
        for j, (region, weight) in enumerate(zip(self.regions, self.weights)):
            require(j in pruned or region >= 0, f"patch {j} is in no region and not pruned")
            require(j not in pruned or weight == 0, f"patch {j} is pruned; its weight must be 0, not {weight}")
        require(self.trains in ("both", "reconstruct"), f"trains is {self.trains!r}; 'both' or 'reconstruct' is needed")
        for name in ("regions", "pruned"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "weights", tuple(float(w) for w in self.weights))

    @property
    def num_merged(self) -> int:
        """How many tokens the patches become (prefix tokens not counted)."""
        return max(self.regions, default=-1) + 1

    def check(self, shape: ViTShape) -> None:
        """InputError where the rule is for another number of patches."""
        require(len(self.regions) == shape.num_patches,
                 f"tokens.regions has {len(self.regions)} entries; the model has {shape.num_patches} patches")


TOKEN_RULES = {MergeReconstruct.kind: MergeReconstruct}
TokenRule = MergeReconstruct
