"""topi_int8 on a TVM that has Relay: the same kernels, in Relay's op strategies."""

from ..switch import Switch
from . import alter_layout, build, qnn_legalize, requantize, strategy
from .convert_layout import ConvertLayout
from .database import SLOTS as _DATABASE_SLOTS
from .database import database
from .explain import explain, library_counts

_switch = Switch(
    *strategy.SLOTS, *alter_layout.SLOTS, *qnn_legalize.SLOTS, *build.SLOTS, *requantize.SLOTS,
    *_DATABASE_SLOTS,
)  # fmt: skip
enable, disable = _switch.enable, _switch.disable
disabled, is_enabled = _switch.disabled, _switch.is_enabled

__all__ = [
    "ConvertLayout",
    "database",
    "disable",
    "disabled",
    "enable",
    "explain",
    "is_enabled",
    "library_counts",
]
