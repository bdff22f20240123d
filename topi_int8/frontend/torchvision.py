"""Import torchvision where its C++ extension cannot load beside this torch.

PyPI's torchvision is built against a CUDA torch. Beside a CPU-only torch its extension does not
load, and then `import torchvision` fails with "operator torchvision::nms does not exist", because
Python code registers fake kernels for operators that the extension would have declared. The models
are pure Python and use none of them: declaring the two schemas first is all it takes.

On a machine whose torchvision matches its torch this does nothing but import it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

# Held for the life of the process: torch drops a library's schemas when the object is collected.
_declared: list[Any] = []

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def import_torchvision() -> ModuleType:
    """Return the torchvision module, with the missing schemas declared if that is what it needs.

    Raises
    ------
    ImportError
        torch or torchvision is not installed (``pip install topi_int8[torch]``).
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "torchvision models need torch: pip install 'topi_int8[torch]'"
        ) from error
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    except ImportError as error:
        raise ImportError("torchvision is not installed: pip install 'topi_int8[torch]'") from error
    else:
        return torchvision
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + _SCHEMA)
    _declared.append(library)
    import torchvision

    return torchvision
