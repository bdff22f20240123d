"""bench/rivals: TVM's default computes the same thing; oneDNN is asked for the same layer."""

import numpy as np
import pytest
import tvm
from tvm import relax

from bench import targets, workloads
from bench.rivals import Unavailable, onednn, tvm_default
from bench.shape_lines import parse_line
from tests import reference
from topi_int8 import override
from topi_int8.workload import Conv2dWorkload

LINES = ("g2ic4ih6oc6kh3sh2ph1", "5x24:24x20", "3x5x24:3x24x16")
CASES = (("u8s8", ""), ("s8s8", "bias+sum+relu+s8"), ("u8s8", "relu+s32"), ("f32", "bias+relu+f32"))


@pytest.fixture(scope="module")
def host():
    return targets.choose("host")


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize(("dtype", "epilogue"), CASES)
def test_tvm_default_computes_the_workload(host, line, dtype, epilogue):
    work = workloads.make(parse_line(line), dtype, epilogue)
    module, inputs = tvm_default.relax_module(work)
    with override.disabled():
        compiled = tvm.compile(module, target=host)
    args = [tvm.runtime.tensor(array) for array in inputs]
    got = relax.VirtualMachine(compiled, tvm.cpu())["main"](*args).numpy()
    compute = reference.conv2d if isinstance(work, Conv2dWorkload) else reference.matmul
    wanted = compute(work, **workloads.random_operands(work).__dict__)
    assert got.dtype == wanted.dtype
    tolerance = 1e-4 if dtype == "f32" else 0
    np.testing.assert_allclose(got, wanted.reshape(got.shape), atol=tolerance)


def test_tvm_default_is_sampled(host):
    rival = tvm_default.TvmDefault()
    sample, note = rival.prepare(workloads.make(parse_line(LINES[0])), host)
    assert min(sample(0.001)) > 0 and note in ("", "~")


def test_tvm_default_skips_what_would_take_too_long(host):
    work = workloads.make(parse_line("ic512ih512oc512kh3ph1"))
    with pytest.raises(Unavailable, match=r"skipped: est. 309\.2 s"):
        tvm_default.TvmDefault(1.0).prepare(work, host)
    with pytest.raises(ValueError, match="limit is 0"):
        tvm_default.TvmDefault(0)


def test_a_slow_layer_is_run_once(host):
    work = workloads.make(parse_line("ic64ih20oc64kh3ph1"))
    # Below the estimate's 7 ms the layer is tried; 1 ns makes the measured time too long.
    rival = tvm_default.TvmDefault(1.0)
    sample, _ = rival.prepare(work, host)
    rival.limit = 1e-9
    first = sample(10.0)
    assert len(first) == 1 and first == sample(10.0)


def test_onednn_request():
    work = workloads.make(
        parse_line("g2mb3ic8ih10iw7oc16kh3kw1sh2ph1dh1"), "s8s8", "bias+sum+relu+u8"
    )
    kind, *fields = onednn.request(work).split()
    values = dict(field.split("=") for field in fields)
    assert kind == "conv"
    assert values == {
        "dtype": "s8", "out": "u8", "bias": "1", "relu": "1", "sum": "1", "g": "2", "mb": "3",
        "ic": "8", "ih": "10", "iw": "7", "oc": "16", "oh": "4", "ow": "7", "kh": "3", "kw": "1",
        "sh": "2", "sw": "1", "dh": "1", "dw": "0", "ph": "1", "pw": "0", "ph_r": "1", "pw_r": "0",
    }  # fmt: skip
    kind, *fields = onednn.request(workloads.make(parse_line("5x24:24x20"))).split()
    values = dict(field.split("=") for field in fields)
    assert kind == "dense" and values["constant"] == "1"
    assert [values[key] for key in ("batch", "m", "n", "k")] == ["1", "5", "20", "24"]


def test_every_isa_has_a_name_in_onednn():
    from topi_int8.target import X86_ISAS

    assert set(onednn.MAX_CPU_ISA) == {isa.name for isa in X86_ISAS}


def test_onednn_not_set_up(host, tmp_path):
    rival = onednn.OneDnn(tmp_path)
    with pytest.raises(Unavailable, match=r"not set up \(make onednn\)"):
        rival.prepare(workloads.make(parse_line(LINES[0])), host)
    rival.close()


def test_onednn_setup_says_what_failed(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libdnnl.so").write_text("")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="no-such-compiler"):
        onednn.setup(tmp_path)


@pytest.fixture(scope="module")
def oneDNN():
    if not onednn.is_set_up():
        pytest.skip("oneDNN is not set up (make onednn)")
    rival = onednn.OneDnn()
    yield rival
    rival.close()


@pytest.mark.parametrize("line", ["ic16ih6oc16kh3sh2ph1", "g16ic16ih6oc16kh3ph1", *LINES[1:]])
@pytest.mark.parametrize(("dtype", "epilogue"), CASES)
def test_onednn_answers(oneDNN, host, line, dtype, epilogue):
    work = workloads.make(parse_line(line), dtype, epilogue)
    sample, implementation = oneDNN.prepare(work, host)
    assert len(sample(0.002)) >= 3 and min(sample(0.002)) > 0
    assert implementation and not implementation.startswith("ref")
    assert oneDNN.version.startswith("oneDNN ")


def test_onednn_refuses_and_goes_on(oneDNN, host):
    work = workloads.make(parse_line(LINES[0]))
    oneDNN.prepare(work, host)
    with pytest.raises(Unavailable, match="request lacks"):
        oneDNN._ask("conv dtype=u8 out=u8 bias=0 relu=0 sum=0", 0.001)
    with pytest.raises(Unavailable, match="unknown kind pool"):
        oneDNN._ask("pool dtype=u8", 0.001)
    assert oneDNN.prepare(work, host)[1]
