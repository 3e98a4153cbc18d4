"""Extreme eigenvalues of 𝓘, of M and of 𝓚 (Eq. 13, Corollary 4.2, Appendix E.I)."""

from fimlib.spectra.extreme import Spectrum, lambda_max, spectrum
from fimlib.spectra.z_eigenvalues import fourth_moment_spectrum, shifted_power_method

__all__ = ["Spectrum", "fourth_moment_spectrum", "lambda_max", "shifted_power_method", "spectrum"]
