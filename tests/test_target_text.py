"""Targets by the words of a command line."""

from __future__ import annotations

import pytest

from topi_int8 import target as targets
from topi_int8.target_text import parse_target


@pytest.mark.parametrize(
    ("text", "isa"),
    [
        ("llvm -mtriple=x86_64-linux-gnu -mcpu=cascadelake", "avx512_vnni"),
        ("llvm -mtriple=x86_64-linux-gnu -mcpu=haswell -mattr=+avxvnni -num-cores=4", "avx_vnni"),
        ('{"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "haswell"}', "avx2"),
        ("graviton3", "neon_i8mm"),
        ("rpi4", "neon"),
    ],
)
def test_texts(text: str, isa: str) -> None:
    assert targets.features(parse_target(text)).isas[0] == isa


def test_host_and_options_arrive() -> None:
    assert str(parse_target("host")) == str(targets.host_target())
    target = parse_target("llvm -mcpu=haswell -num-cores=3 -mattr=+f16c,+fma")
    assert int(target.attrs["num-cores"]) == 3
    assert list(map(str, target.attrs["mattr"])) == ["+f16c", "+fma"]


@pytest.mark.parametrize("text", ["", "{", "nonsense", "llvm mcpu=haswell", "llvm -mcpu", "c"])
def test_what_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="target is"):
        parse_target(text)
