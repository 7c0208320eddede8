"""Figures: every one is drawn here and saved through save_figure."""
from vitlab.plots.base import save_figure, to_image
from vitlab.plots.changes import changed_pictures, class_changes, corruption_curves, reliability, stream_similarity
from vitlab.plots.class_iou import class_iou_bars
from vitlab.plots.colours import class_colours, coloured, overlaid
from vitlab.plots.cuts import sensitivity, sensitivity_curves
from vitlab.plots.plans import compare_plans, cost_by_part, kept_counts, plan_bars
from vitlab.plots.points import front, pareto
from vitlab.plots.scenes import difference, outcomes, predictions, scene_moment, scene_regions
from vitlab.plots.search import acquisition, gp_slices, incumbents, moment, parallel_coordinates
from vitlab.plots.speed import block_shares, speed_curves
from vitlab.plots.tokens import attention_spans, matched_map, merge_map, score_maps, token_sheet, token_strip
from vitlab.plots.training import accuracy_against_cost, trade_offs, training_curves
from vitlab.plots.units import head_rollouts, redundancy_matrices, rollout, unit_scores
