"""From files to tensors: readers, dataset layouts, image sets in memory, DigitAnatomy."""

from typing import TYPE_CHECKING

from squid_fast._lazy import lazy_names

if TYPE_CHECKING:
    from squid_fast.data.digit_anatomy import KINDS, DigitAnatomy, DigitGrids
    from squid_fast.data.digit_files import write_digit_anatomy
    from squid_fast.data.handwriting import DigitSourceError
    from squid_fast.data.images import ImageSet, load_images
    from squid_fast.data.layouts import LAYOUTS, find_records
    from squid_fast.data.pixels import MAX_PIXELS, ImageReadError
    from squid_fast.data.readers import IMAGE_SUFFIXES, load_image, read_image
    from squid_fast.data.records import LayoutError, Record, select
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "digit_anatomy": ("KINDS", "DigitAnatomy", "DigitGrids"),
            "digit_files": ("write_digit_anatomy",),
            "handwriting": ("DigitSourceError",),
            "images": ("ImageSet", "load_images"),
            "layouts": ("LAYOUTS", "find_records"),
            "pixels": ("MAX_PIXELS", "ImageReadError"),
            "readers": ("IMAGE_SUFFIXES", "load_image", "read_image"),
            "records": ("LayoutError", "Record", "select"),
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
