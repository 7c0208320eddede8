"""What to cut: policies under a budget, proposed one after the other, measured by any callable."""
from vitlab.search.budget import Budget
from vitlab.search.space import SearchSpace
from vitlab.search.study import Study
