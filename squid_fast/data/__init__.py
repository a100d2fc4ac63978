"""From files to tensors: readers, dataset layouts, image sets in memory, DigitAnatomy."""

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names

if TYPE_CHECKING:
    from .formats import IMAGE_SUFFIXES
    from .images import ImageSet, load_images
    from .layouts import LAYOUTS, find_records
    from .pixels import MAX_PIXELS, ImageReadError
    from .readers import load_image, read_image
    from .records import LayoutError, Record, select
    from .synthetic.digit_anatomy import KINDS, DigitAnatomy, DigitGrids
    from .synthetic.digit_files import write_digit_anatomy
    from .synthetic.handwriting import DigitSourceError
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "images": ("ImageSet", "load_images"),
            "formats": ("IMAGE_SUFFIXES",),
            "layouts": ("LAYOUTS", "find_records"),
            "pixels": ("MAX_PIXELS", "ImageReadError"),
            "readers": ("load_image", "read_image"),
            "records": ("LayoutError", "Record", "select"),
            "synthetic.digit_anatomy": ("KINDS", "DigitAnatomy", "DigitGrids"),
            "synthetic.digit_files": ("write_digit_anatomy",),
            "synthetic.handwriting": ("DigitSourceError",),
        },
    )

__all__ = [
    "IMAGE_SUFFIXES",
    "KINDS",
    "LAYOUTS",
    "MAX_PIXELS",
    "DigitAnatomy",
    "DigitGrids",
    "DigitSourceError",
    "ImageReadError",
    "ImageSet",
    "LayoutError",
    "Record",
    "find_records",
    "load_image",
    "load_images",
    "read_image",
    "select",
    "write_digit_anatomy",
]
