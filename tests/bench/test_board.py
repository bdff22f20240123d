"""bench/board.py and what stands on it: commands against a tracker and a server on this machine,
the same under qemu as on a Raspberry Pi, and the refusals in words.
"""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm.script import from_source
from tvm.script import tirx as T
from typer.testing import CliRunner

from bench import board, board_cpu, cli, run
from bench.shape_lines import parse_line
from tests.bench.local_board import NO_QEMU, QEMU_PYTHON, local_board
from tests.rpc_process import HOST
from topi_int8 import cross
from topi_int8 import target as targets

KEY = "haswell"  # names a target, which any x86-64 machine of today executes
FAST = ["--min-time", "0.002", "--rounds", "2"]
TINY = 'ic16ih6oc16kh3ph1n"tiny*2"'

pytest.importorskip("tornado", reason="tornado is not installed (extra `rpc`)")
pytest.importorskip("cloudpickle", reason="cloudpickle is not installed (extra `rpc`)")
needs_x86 = pytest.mark.skipif(
    not targets.runs_here("avx2"), reason="this CPU lacks avx2: no local board of it"
)
needs_qemu = pytest.mark.skipif(NO_QEMU is not None, reason=str(NO_QEMU))

ABORT = """
@T.prim_func
def main(x: T.Buffer((1,), "int32")):
    T.func_attr({"global_symbol": "main"})
    T.evaluate(T.call_extern("int32", "abort"))
"""


def bench(*args: str):
    return CliRunner().invoke(cli.app, [*args], terminal_width=200)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The address of a tracker with a server of this machine."""
    with local_board(KEY, tmp_path_factory.mktemp("board")) as address:
        yield address


@pytest.fixture(scope="module")
def qemu(tmp_path_factory):
    """The address of a tracker with a Cortex-A72 under qemu."""
    folder = tmp_path_factory.mktemp("rpi4")
    environment = {"QEMU_CPU": "cortex-a72"}
    with local_board("rpi4", folder, QEMU_PYTHON, environment) as address:
        yield address


@needs_x86
def test_conv(here, tmp_path: Path):
    out = tmp_path / "out.json"
    args = ["--rpc", here, "--key", KEY, "--shape", TINY, "--shape", "ic8ih4oc8kh1"]
    done = bench("conv", *args, "--check", "--note", "a test", "--json", str(out), *FAST)
    assert done.exit_code == 0, done.output
    assert "target haswell (the key's)" in done.output and "oneDNN" in done.output
    document = json.loads(out.read_text())
    assert document["format"] == 1 and document["command"] == "conv"
    about = document["machine"]
    assert about["arch"] == "x86_64" and "avx2" in about["features"] and about["date"]
    assert about["cores"] >= 1 and not about["emulated_on"]
    assert document["host"]["packages"]["apache-tvm"] and document["note"] == "a test"
    assert '"mcpu":"haswell"' in document["options"]["target"]
    for layer in document["layers"]:
        assert layer["checked"] and layer["min_us"] > 0 and layer["peak_percent"] is None
        assert layer["rivals"]["tvm"]["min_us"] > 0 and "onednn" not in layer["rivals"]


@needs_x86
def test_dense_for_a_target_of_its_own(here, tmp_path: Path):
    out = tmp_path / "out.json"
    args = ["--rpc", here, "--key", KEY, "--target", '{"kind": "llvm", "mcpu": "x86-64-v2"}']
    args += ["--shape", "5x24:24x20", "--rivals", "none", "--check", "--json", str(out)]
    done = bench("dense", *args, *FAST)
    assert done.exit_code == 0, done.output
    document = json.loads(out.read_text())
    assert "generic" in document["layers"][0]["strategy"] and document["layers"][0]["checked"]


@needs_x86
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--key", "rpi9"], "key is 'rpi9', which names no target: give --target"),
        (["--key", "znver3"], f"key is 'znver3'; allowed: those at the tracker ({KEY})"),
        (["--key", KEY, "--target", "{"], "target is '{'"),
        (["--target", KEY], "key is ''; allowed: the --key that"),
        (["--key", KEY, "--isa", "avx2"], "isa is 'avx2'; allowed with --rpc: --target"),
        (["--key", KEY, "--cpu", "0"], "cpu is (0,); allowed only without --rpc"),
        (["--key", KEY, "--threads", "0"], "threads is 0"),
        (["--key", KEY, "--cc", "no-such-cc -O2"], "cc is 'no-such-cc -O2'; allowed"),
        (["--key", KEY, "--cc", "false"], "cc cannot link for x86_64-unknown-linux-gnu: false:"),
        (["--key", KEY, "--model", "mca"], "allowed without --model"),
    ],
)
def test_refusals(here, args, words):
    done = bench("conv", "--rpc", here, "--shape", TINY, *args)
    assert done.exit_code == 2
    assert words in done.stderr and "Traceback" not in done.stderr


def test_no_tracker():
    with socket.socket() as bound:  # it never listens, so a connection is refused
        bound.bind((HOST, 0))
        address = f"{HOST}:{bound.getsockname()[1]}"
        done = bench("conv", "--rpc", address, "--key", "rpi4", "--shape", TINY, "--cc", "true")
    assert done.exit_code == 2
    assert f"rpc is '{address}': nothing answers there" in done.stderr
    assert "python -m tvm.exec.rpc_tracker" in done.stderr


@pytest.mark.parametrize("option", ["--key", "--cc"])
def test_options_that_need_a_board(option):
    done = bench("conv", option, "rpi4", "--shape", TINY)
    assert done.exit_code == 2
    assert f"{option[2:]} is 'rpi4'; allowed only with --rpc" in done.stderr


@pytest.mark.parametrize("text", ["", "pi", "pi:", ":9190", "pi:0", "pi:99999", "pi:http"])
def test_addresses_refused(text):
    with pytest.raises(ValueError, match="allowed: HOST:PORT"):
        board.parse_address(text)


def test_addresses():
    assert board.parse_address("pi.local:9190") == ("pi.local", 9190)
    assert board.parse_address("[::1]:9190") == ("::1", 9190)


def test_key_names_the_target():
    assert str(board.choose_target("rpi4", None).attrs["mcpu"]) == "cortex-a72"
    assert str(board.choose_target("rpi4", "rpi5", 2).attrs["mcpu"]) == "cortex-a76"
    assert int(board.choose_target("rpi4", None, 3).attrs["num-cores"]) == 3


@needs_x86
def test_a_board_of_another_architecture(here):
    if shutil.which("aarch64-linux-gnu-gcc") is None:
        pytest.skip("aarch64-linux-gnu-gcc is not installed")
    done = bench("conv", "--rpc", here, "--key", KEY, "--target", "rpi4", "--shape", TINY)
    assert done.exit_code == 2
    assert f"{KEY} does not load a library for aarch64-linux-gnu" in done.stderr


@needs_x86
def test_a_target_beyond_the_board(here, monkeypatch):
    monkeypatch.setattr(board_cpu, "lacking", lambda about, target: ["amx-tile"])
    done = bench("conv", "--rpc", here, "--key", KEY, "--shape", TINY)
    assert done.exit_code == 2
    assert f"key is '{KEY}': the board lacks amx-tile; it cannot run there" in done.stderr


@pytest.mark.parametrize(
    ("name", "features", "wanted"),
    [
        ("rpi4", {"asimd"}, []),
        ("rpi5", {"asimd", "atomics", "asimdhp", "asimdrdm"}, ["dotprod"]),
        ("rpi2", {"neon"}, []),
        ("cascadelake", {"avx2"}, ["avx512vnni"]),
    ],
)
def test_lacking(name, features, wanted):
    missing = board_cpu.lacking({"features": sorted(features)}, targets.named(name))
    assert set(wanted) <= set(missing) and ("neon" not in missing) and bool(wanted) == bool(missing)


def test_core_names():
    def core(part: str) -> dict[str, str]:
        return {"CPU implementer": "0x41", "CPU part": part}

    cores = [core("0xd03")] * 4 + [core("0xd08")] * 2 + [core("0xfff")]
    wanted = "4x Cortex-A53 + 2x Cortex-A72 + 1x implementer 0x41 part 0xfff"
    assert board_cpu._core_names(cores) == wanted
    assert board_cpu._core_names([]) == "unknown"


@pytest.mark.parametrize(
    ("name", "package"),
    [("rpi4", "gcc-aarch64-linux-gnu"), ("rpi2", "gcc-arm-linux-gnueabihf")],
)
def test_no_cross_compiler_names_the_package(monkeypatch, name, package):
    monkeypatch.setattr(shutil, "which", lambda command: None)
    with pytest.raises(ValueError, match=rf"install Debian's {package} .*--cc"):
        cross.find(targets.named(name))


def test_cross_compilers(monkeypatch):
    have: set[str] = set()
    monkeypatch.setattr(shutil, "which", lambda command: command if command in have else None)
    have |= {"clang", "ld.lld"}
    target = targets.named("rpi4-32")
    assert cross.find(target)[:2] == ("clang", "--target=arm-linux-gnueabihf")
    have.add("arm-linux-gnueabihf-gcc")
    assert cross.find(target) == ("arm-linux-gnueabihf-gcc",)
    assert cross.find(target, "clang -target arm") == ("clang", "-target", "arm")


@needs_x86
def test_a_crash_ends_the_server_and_is_said(tmp_path: Path):
    with local_board(KEY, tmp_path) as address:
        target = board.choose_target(KEY, None)
        place = board.connect(address, KEY, target)
        options = run.Options(target, min_time=0.002, rounds=1, place=place)
        assert run.run_layer(parse_line(TINY), options, []).gops > 0
        func = from_source(ABORT, {"T": T})
        executable = tvm.compile(tvm.IRModule({"main": func}), target=target)
        assert not place.lost()
        argument = place.tensor(np.zeros(1, "int32"))
        with pytest.raises(RuntimeError):
            place.load(executable)["main"](argument)
        result = run.run_layer(parse_line(TINY), options, [])
        assert f"the RPC server of {KEY} is gone" in result.error
        assert f"--key {KEY}" in result.error


@needs_qemu
@pytest.mark.slow_emulator
def test_conv_on_a_raspberry_pi_under_qemu(qemu, tmp_path: Path):
    out = tmp_path / "out.json"
    args = ["--rpc", qemu, "--key", "rpi4", "--shape", TINY, "--shape", "g8ic8ih4oc8kh3ph1"]
    done = bench("conv", *args, "--check", "--json", str(out), *FAST)
    assert done.exit_code == 0, done.output
    assert "its times say nothing about any core" in done.output.replace("\n", " ")
    document = json.loads(out.read_text())
    about = document["machine"]
    assert about["arch"] == "aarch64" and about["cpu"] == "emulated" and about["emulated_on"]
    assert "asimd" in about["features"] and "asimddp" not in about["features"]
    assert all(layer["checked"] and layer["min_us"] > 0 for layer in document["layers"])
    assert document["layers"][0]["strategy"] == "conv2d_nchwc_neon"


@needs_qemu
@pytest.mark.slow_emulator
def test_dense_on_a_raspberry_pi_under_qemu(qemu):
    args = ["--rpc", qemu, "--key", "rpi4", "--shape", "5x24:24x20", "--rivals", "none", "--check"]
    done = bench("dense", *args, *FAST)
    assert done.exit_code == 0, done.output


@needs_qemu
@pytest.mark.slow_emulator
def test_dotprod_is_refused_by_a_cortex_a72_under_qemu(qemu):
    args = ["--rpc", qemu, "--key", "rpi4", "--target", "neoverse-n1", "--shape", TINY]
    done = bench("conv", *args)
    assert done.exit_code == 2
    assert "target is 'neoverse-n1': the board lacks dotprod" in done.stderr
