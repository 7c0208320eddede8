"""Expected Improvement, larger is better, and its logarithm (Jones et al. 1998; log form: Ament et al., arXiv
2310.20708)."""
import numpy as np
from scipy.special import erfcx, ndtr

FAR = -1e4              # below it, 1 + z * ratio would be rounding alone; its limit there is 1 / z^2


def expected_improvement(mean: np.ndarray, deviation: np.ndarray, best: float) -> np.ndarray:
    """E[max(Y - best, 0)] with Y ~ N(mean, deviation^2): deviation * (phi(z) + z Phi(z)), z = (mean - best) /
    deviation.

    Any shapes that broadcast; not negative. Where deviation is 0 it is max(mean - best, 0).
    """
    mean, deviation = np.asarray(mean, dtype=np.float64), np.asarray(deviation, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = (mean - best) / deviation
        value = deviation * (np.exp(-z * z / 2) / np.sqrt(2 * np.pi) + z * ndtr(z))
    return np.where(deviation > 0, np.maximum(value, 0), np.maximum(mean - best, 0))


def log_expected_improvement(mean: np.ndarray, deviation: np.ndarray, best: float) -> np.ndarray:
    """The logarithm of `expected_improvement`, finite where that vanishes (deviation > 0 is needed).

    log deviation + log h(z), h = phi(z) + z Phi(z). For z > -1 directly; below, h = phi(z) * (1 + z Phi(z) / phi(z))
    with Phi / phi from erfcx, which does not vanish; far below, 1 + z Phi / phi is 1 / z^2.
    """
    z = (np.asarray(mean, dtype=np.float64) - best) / np.asarray(deviation, dtype=np.float64)
    near, low = np.maximum(z, -1), np.clip(z, FAR, -1)
    direct = np.log(np.exp(-near * near / 2) / np.sqrt(2 * np.pi) + near * ndtr(near))
    ratio = np.sqrt(np.pi / 2) * erfcx(-low / np.sqrt(2))                       # Phi(z) / phi(z)
    log_phi = -z * z / 2 - np.log(2 * np.pi) / 2
    tail = log_phi + np.where(z < FAR, -2 * np.log(np.maximum(-z, 1)), np.log1p(low * ratio))
    return np.log(deviation) + np.where(z > -1, direct, tail)
