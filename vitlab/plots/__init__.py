"""Figures: every one is drawn here and saved through save_figure."""
from vitlab.plots.base import save_figure, to_image
from vitlab.plots.tokens import kept_counts, merge_map, score_maps
from vitlab.plots.training import accuracy_against_cost, training_curves

__all__ = ["accuracy_against_cost", "kept_counts", "merge_map", "save_figure", "score_maps", "to_image",
           "training_curves"]
