"""topi_int8: int8 convolution and dense on CPUs, fast, through Apache TVM's own compile.

Importing it registers the tensor intrinsics and makes ``tvm.compile(mod, target)`` for LLVM CPU
targets use the strategies of this package; `disable` and `disabled` switch that off.
"""

from . import _requirements

_requirements.check()  # before anything imports tvm: a wrong pair would crash later, without a word

from . import target  # noqa: E402
from ._version import __version__  # noqa: E402
from .explain import explain, library_counts  # noqa: E402
from .override import disable, disabled, enable, is_enabled  # noqa: E402
from .quantize import quantize  # noqa: E402
from .target import features, host_target  # noqa: E402
from .transform.pipeline import pipeline  # noqa: E402

__all__ = [
    "__version__",
    "disable",
    "disabled",
    "enable",
    "explain",
    "features",
    "host_target",
    "is_enabled",
    "library_counts",
    "pipeline",
    "quantize",
    "target",
]

enable()
