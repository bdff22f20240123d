"""A Target from the words of a command line."""

from __future__ import annotations

import json
import shlex
from typing import Any

from tvm.target import Target

from . import target as targets
from . import target_names

HOST = "host"
# Options whose value is a list, or a number, in TVM's dictionary of an llvm Target.
_LISTS, _NUMBERS = ("mattr", "keys"), ("num-cores", "vector-width", "opt-level")


def parse_target(text: str) -> Target:
    """Return the Target that a text names.

    Parameters
    ----------
    text : str
        "host", a name of `topi_int8.target_names`, TVM's tag or JSON dictionary, or the options of
        an llvm Target as TVM's Relay wrote them: ``llvm -mcpu=cascadelake -mattr=+avx512vnni``.

    Raises
    ------
    ValueError
        When TVM does not know it, or it is no CPU target of LLVM.
    """
    try:
        if text in target_names.TARGETS:
            return targets.named(text)
        target = targets.host_target() if text == HOST else Target(_config(text))
    except Exception as error:
        raise ValueError(
            f"target is {text!r}; allowed: {HOST}, a name of topi_int8.target_names, "
            f"'llvm -mcpu=...', or what tvm.target.Target takes: {error}"
        ) from None
    targets.features(target)
    return target


def _config(text: str) -> str | dict[str, Any]:
    """Return what TVM's Target takes for a text."""
    if text.lstrip().startswith("{"):
        return json.loads(text)
    kind, *options = shlex.split(text)
    if not options:
        return text
    config: dict[str, Any] = {"kind": kind}
    for option in options:
        name, equals, value = option.lstrip("-").partition("=")
        if not option.startswith("-") or not equals:
            raise ValueError(f"{option!r} is no option; allowed: -NAME=VALUE, as -mcpu=cascadelake")
        config[name] = _value(name, value)
    return config


def _value(name: str, text: str) -> Any:
    if name in _LISTS:
        return text.split(",")
    return int(text) if name in _NUMBERS else text
