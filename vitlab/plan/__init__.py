"""What is cut and what it costs, as pure data and functions."""
from vitlab.plan.plan import BlockPlan as BlockPlan
from vitlab.plan.plan import CompressionPlan as CompressionPlan
