"""topi_int8 on a TVM that has Relay: the same kernels, in Relay's op strategies."""

from ..switch import Switch
from . import alter_layout, build, strategy
from .convert_layout import ConvertLayout

_switch = Switch(*strategy.SLOTS, *alter_layout.SLOTS, *build.SLOTS)
enable, disable = _switch.enable, _switch.disable
disabled, is_enabled = _switch.disabled, _switch.is_enabled
explain = None

__all__ = ["ConvertLayout", "disable", "disabled", "enable", "explain", "is_enabled"]
