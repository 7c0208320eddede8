"""The Gaussian process of the search: scikit-learn's, a Matern kernel with a length scale per dimension (Rasmussen and
Williams, *Gaussian Processes for Machine Learning*, 2006, sections 4.2 and 5.1)."""
import warnings

import numpy as np

SMOOTHNESS = 2.5                # nu of the Matern kernel: twice differentiable, the book's usual choice beside 1.5
LENGTH_BOUNDS = (0.1, 30.0)     # in boxes: below, a policy says nothing of any other; above, a dimension doesn't count
AMPLITUDE_BOUNDS = (1e-2, 1e2)  # variance, of standardised values: theirs is 1
NOISE_BOUNDS = (1e-6, 1.0)      # the same: from a thousandth of their deviation to all of it
NOISE = 1e-2                    # where its fit begins
JITTER = 1e-10                  # scikit-learn's default


class Surrogate:
    """Mean and deviation of the objective at any policy, from those measured. x (P, D) in [0, 1], values (P)."""

    def __init__(self, x: np.ndarray, values: np.ndarray, *, noise: float | None = None) -> None:
        """noise: variance of the standardised values; None fits it."""
        # here, as it takes a fifth of the time in which a command begins
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
        # Lengths begin at half the diagonal of the box, as distances in it grow with sqrt(D).
        lengths = np.full(x.shape[1], np.sqrt(x.shape[1]) / 2)
        kernel = ConstantKernel(1.0, AMPLITUDE_BOUNDS) * Matern(lengths, LENGTH_BOUNDS, nu=SMOOTHNESS)
        if noise is None:
            kernel = kernel + WhiteKernel(NOISE, NOISE_BOUNDS)
        self.fits_noise = noise is None
        self.process = GaussianProcessRegressor(kernel, alpha=JITTER if noise is None else noise, normalize_y=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)                 # a length scale at its bound is no news
            self.process.fit(x, values)

    def predict(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(mean, deviation) of the objective itself, (P) each: the measurement's noise is left out."""
        mean, deviation = self.process.predict(x, return_std=True)
        if self.fits_noise:
            noise = self.process.kernel_.k2.noise_level * self.process._y_train_std**2
            deviation = np.sqrt(np.maximum(deviation**2 - noise, 0))
        return mean, np.maximum(deviation, 1e-9 * self.process._y_train_std)
