"""A trained model at work: calibrated, and scoring as fast as the machine can.

``scorer`` holds the public face, ``calibration`` what it needs to know of normal images. The model
is frozen by ``network``, of convolutions that ``convolution`` has folded and ``quantization`` can
put in bytes; ``precision`` chooses between them, ``graphs`` replays the network on a GPU.
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
