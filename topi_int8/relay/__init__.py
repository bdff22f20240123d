"""topi_int8 on a TVM that has Relay: the same kernels, in Relay's op strategies."""

from ..switch import Switch
from . import alter_layout, build, strategy
from . import database as _database
from .convert_layout import ConvertLayout
from .explain import explain, library_counts

_switch = Switch(*strategy.SLOTS, *alter_layout.SLOTS, *build.SLOTS, *_database.SLOTS)
enable, disable = _switch.enable, _switch.disable
disabled, is_enabled = _switch.disabled, _switch.is_enabled


def database():
    return _database.dispatching(is_enabled)


__all__ = [
    "ConvertLayout",
    "disable",
    "disabled",
    "enable",
    "explain",
    "is_enabled",
    "library_counts",
]
