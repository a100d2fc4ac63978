"""A trained model at work: frozen, calibrated, and scoring as fast as the machine can.

``model`` measures images with a frozen pair; ``scorer`` makes calibrated scores of what it measures
and ``calibration`` finds the calibration; ``export`` writes a scorer as a file for other runtimes.
``network`` freezes the generator, of convolutions that ``convolution`` folds and ``quantization``
quantizes, and ``discriminator`` the discriminator; ``precision`` chooses between the former, and
``graphs`` replays all on a GPU.
"""

from .bundle import Bundle, BundleError, load_bundle, save_bundle
from .calibration import calibrate
from .precision import AGREEMENT, check_hardware
from .scorer import Scorer, Scores

__all__ = [
    "AGREEMENT",
    "Bundle",
    "BundleError",
    "Scorer",
    "Scores",
    "calibrate",
    "check_hardware",
    "load_bundle",
    "save_bundle",
]
