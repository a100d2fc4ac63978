"""What a bare GPU machine lacks, for rehearsals: Python reads this file first if it finds it.

Modules stand here by the names that they are imported by. To a program they are not installed:
importing one raises ``ModuleNotFoundError``, and ``importlib.util.find_spec`` finds none.
"""

import sys

ABSENT = (
    "imagecodecs",
    "jinja2",
    "lightning_fabric",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pandas",
    "pyarrow",
    "pydantic",
    "pydicom",
    "ray",
    "rich",
    "scipy",
    "sklearn",
    "tensorboard",
    "tifffile",
    "typer",
)
sys.modules.update(dict.fromkeys(ABSENT))  # type: ignore[arg-type]
