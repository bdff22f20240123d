"""bench/targets.py: what --isa and --target choose, and the refusals in words."""

import json

import pytest

from bench import targets
from topi_int8 import _host
from topi_int8 import target as topi_target


def every_flag() -> frozenset[str]:
    features = [f for _, added in topi_target.LEVELS for f in added]
    features += topi_target.BEYOND_LEVELS
    return frozenset(topi_target.KERNEL_FLAG.get(f, f) for f in features)


@pytest.fixture
def whole_cpu(monkeypatch):
    """A CPU that has everything topi_int8 knows."""
    monkeypatch.setattr(_host, "cpu_flags", every_flag)
    monkeypatch.setattr(_host, "machine", lambda: "x86_64")
    monkeypatch.setattr(_host, "amx_permitted", lambda: True)


@pytest.fixture
def avx2_cpu(monkeypatch):
    """A CPU without AVX-512."""
    flags = frozenset(f for f in every_flag() if not f.startswith(("avx512", "avx_", "amx")))
    monkeypatch.setattr(_host, "cpu_flags", lambda: flags)
    monkeypatch.setattr(_host, "machine", lambda: "x86_64")


@pytest.mark.parametrize("isa", [isa for isa in targets.ISAS if isa != "host"])
def test_isa_on_a_cpu_that_has_it(whole_cpu, isa):
    chosen = targets.choose(isa, threads=2)
    assert targets.isa_of(chosen) == targets.ISA_ALIASES.get(isa, isa)
    assert int(chosen.attrs["num-cores"]) == 2
    same = topi_target.isa_target(targets.ISA_ALIASES.get(isa, isa))
    assert topi_target.features(chosen) == topi_target.features(same)


@pytest.mark.parametrize(
    ("isa", "lacks"),
    [
        ("amx", "amx-tile"),
        ("avx512_vnni", "avx512vnni"),
        ("avx_vnni", "avxvnni"),
        ("avx512_bw", "avx512bw"),
    ],
)
def test_isa_on_a_cpu_without_it(avx2_cpu, isa, lacks):
    with pytest.raises(targets.WrongMachineError, match=f"--isa {isa}: this CPU lacks .*{lacks}"):
        targets.choose(isa)
    assert targets.isa_of(targets.choose("avx2")) == "avx2"


def test_host_is_what_the_cpu_has(avx2_cpu):
    assert targets.isa_of(targets.choose("host")) == "avx2"


def test_target_of_a_newer_cpu(avx2_cpu):
    text = json.dumps({"kind": "llvm", "mcpu": "sapphirerapids"})
    with pytest.raises(targets.WrongMachineError, match=r"lacks .*amx-int8"):
        targets.choose(target=text)
    text = json.dumps({"kind": "llvm", "mcpu": "haswell"})
    assert targets.isa_of(targets.choose("amx", text)) == "avx2"


def test_tiles_the_kernel_refuses(whole_cpu, monkeypatch):
    monkeypatch.setattr(_host, "amx_permitted", lambda: False)
    with pytest.raises(targets.WrongMachineError, match="kernel refuses"):
        targets.choose("amx")


def test_target_of_another_architecture(whole_cpu):
    text = json.dumps({"kind": "llvm", "mtriple": "aarch64-linux-gnu"})
    with pytest.raises(targets.WrongMachineError, match="for aarch64; this machine is x86_64"):
        targets.choose(target=text)


@pytest.mark.parametrize("text", ["{", "no-such-target", '{"kind": "c"}'])
def test_unknown_target(text):
    with pytest.raises(ValueError, match="target is"):
        targets.choose(target=text)


def test_unknown_isa():
    with pytest.raises(ValueError, match=r"isa is 'mmx'; allowed: host, amx"):
        targets.choose("mmx")
