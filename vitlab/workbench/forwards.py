"""What the parts of a survey take, about, in forwards of one image through the dense model."""
from vitlab.plan import CompressionPlan, cost
from vitlab.plan.shape import ViTShape

FISHER_COST, TOKEN_COST, REFIT_COST = 3, 4, 5   # of an image


def forwards(shape: ViTShape, macs: float) -> float:
    """As many multiply-adds, in forwards of one image through the dense model."""
    return macs / (1e9 * cost.gmacs(CompressionPlan.empty(shape)))


def moments_cost(shape: ViTShape) -> float:
    """Forwards that the moments of an image take: one, and products of what goes into each layer with itself."""
    products = shape.depth * shape.num_tokens * (shape.num_neurons ** 2 + (shape.num_heads * shape.head_dim) ** 2)
    return 1 + forwards(shape, products)


def elimination_cost(shape: ViTShape) -> float:
    """Forwards that putting the units of all layers in order takes, about."""
    return forwards(shape, 18 * shape.depth * (shape.num_neurons ** 3 + shape.embed_dim ** 3))


def solves_cost(shape: ViTShape) -> float:
    """Forwards that the solves of a refit of every layer take, about, where each has one of many ridges."""
    kept = 0.7 * shape.num_neurons
    return forwards(shape, 72 * shape.depth * (kept ** 3 / 3 + 4 * shape.embed_dim * kept ** 2))


def refit_cost(shape: ViTShape, images: int) -> float:
    """Forwards that a refit of every layer on so many images takes, about."""
    return images * REFIT_COST + solves_cost(shape)
