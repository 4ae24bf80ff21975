"""Let torchvision be imported beside a CPU-only torch.

The registry's torchvision wheel is a CUDA build. Beside a CPU-only torch its compiled library does
not load, and its import dies on two operators whose schemas that library would have registered.
timm and transformers import torchvision, so this module is imported before either of them. Where
the compiled library does load, nothing is done here.
"""

import importlib.util
import pathlib

import torch

_SCHEMAS = ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # fmt: skip


def _compiled_library_loads() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # no torchvision: its importer reports that better than we could
    for library in pathlib.Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            return False
    return True


_LIBRARY = None  # kept alive: torch unregisters the schemas when the library object dies
if not hasattr(torch.ops.torchvision, "nms") and not _compiled_library_loads():
    _LIBRARY = torch.library.Library("torchvision", "DEF")
    for _schema in _SCHEMAS:
        _LIBRARY.define(_schema)
