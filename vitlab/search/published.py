"""The policies that arXiv 2201.00043 published for 60 % fewer MACs (its public repository; methods B7), as data."""
import numpy as np

from vitlab.runtime.files import check_known

# L neuron ratios, L head ratios, rho: the space of neurons, heads and one selection ratio, ranked by all heads.
POLICIES = {
    "deit_small_60": (  # 1.8628 GMACs by its own count (cost.mdc_macs), 60.69 % before fine-tuning
        0.12237, 0.00168, 0.01201, 0.49062, 0.10388, 0.32759, 0.02007, 0.26372, 0.02465, 0.37197, 0.33796, 0.32449,
        0.07641, 0.05489, 0.11644, 0.21189, 0.10277, 0.04060, 0.07933, 0.08571, 0.27671, 0.16643, 0.13445, 0.15967,
        0.48807),
    "deit_base_60": (                               # 6.938 GMACs by its own count, 72.27 % before fine-tuning
        0.49191, 0.42406, 0.35335, 0.26780, 0.12176, 0.06279, 0.46403, 0.08352, 0.07313, 0.00342, 0.02831, 0.17264,
        0.24463, 0.46761, 0.41323, 0.42780, 0.09500, 0.02895, 0.22443, 0.07907, 0.12046, 0.09426, 0.07848, 0.36205,
        0.40072),
}


def published_policy(name: str) -> np.ndarray:
    """The 25 ratios of that name. Raises InputError that lists the known ones."""
    check_known("policy", name, POLICIES)
    return np.array(POLICIES[name])
