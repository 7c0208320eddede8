"""The logarithm of the Expected Improvement, larger is better (Jones et al. 1998; Ament et al., arXiv 2310.20708)."""
import numpy as np
from scipy.special import erfcx, ndtr

FAR = -1e4              # below it, 1 + z * ratio would be rounding alone; its limit there is 1 / z^2


def log_expected_improvement(mean: np.ndarray, deviation: np.ndarray, best: float) -> np.ndarray:
    """log E[max(Y - best, 0)] with Y ~ N(mean, deviation^2), finite where that vanishes; deviation > 0, any shapes.

    log deviation + log h(z), h = phi(z) + z Phi(z), z = (mean - best) / deviation. For z > -1 directly; below, h =
    phi(z) * (1 + z Phi(z) / phi(z)) with Phi / phi from erfcx, which does not vanish; far below, 1 + z Phi / phi is
    1 / z^2.
    """
    z = (np.asarray(mean, dtype=np.float64) - best) / np.asarray(deviation, dtype=np.float64)
    near, low = np.maximum(z, -1), np.clip(z, FAR, -1)
    direct = np.log(np.exp(-near * near / 2) / np.sqrt(2 * np.pi) + near * ndtr(near))
    ratio = np.sqrt(np.pi / 2) * erfcx(-low / np.sqrt(2))                       # Phi(z) / phi(z)
    log_phi = -z * z / 2 - np.log(2 * np.pi) / 2
    tail = log_phi + np.where(z < FAR, -2 * np.log(np.maximum(-z, 1)), np.log1p(low * ratio))
    return np.log(deviation) + np.where(z > -1, direct, tail)
