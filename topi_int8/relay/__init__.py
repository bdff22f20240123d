"""topi_int8 on a TVM that has Relay: the same kernels, in Relay's op strategies."""

from ..switch import Switch
from . import alter_layout, strategy

_switch = Switch(*strategy.SLOTS, *alter_layout.SLOTS)
enable, disable = _switch.enable, _switch.disable
disabled, is_enabled = _switch.disabled, _switch.is_enabled
explain = None
