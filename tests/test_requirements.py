"""_requirements.py: a wrong TVM/FFI pair is refused with the fix, before TVM is loaded."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from topi_int8 import _requirements
from topi_int8._requirements import SUPPORTED, Pair, check

SOURCE = Path(_requirements.__file__)


@pytest.fixture
def installed(monkeypatch):
    """Pretend that just these versions are installed: ``installed(**{"apache-tvm": ...})``."""

    def pretend(**versions: str) -> None:
        def version(distribution: str) -> str:
            if distribution not in versions:
                raise metadata.PackageNotFoundError(distribution)
            return versions[distribution]

        monkeypatch.setattr(metadata, "version", version)

    return pretend


@pytest.mark.parametrize("pair", SUPPORTED, ids=str)
def test_supported_pair_is_accepted(installed, pair):
    versions = {"apache-tvm": pair.tvm, "apache-tvm-ffi": pair.ffi}
    installed(**{name: version for name, version in versions.items() if version is not None})
    assert check() is pair


@pytest.mark.parametrize(
    "versions",
    [
        {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.15"},
        {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.15.post2"},
        {"apache-tvm": "0.26.0", "apache-tvm-ffi": "0.1.14.post1"},
        {"apache-tvm": "0.27.0.post1"},
        {"apache-tvm-ffi": "0.1.14.post1"},
        {},
    ],
    ids=str,
)
def test_other_pair_is_refused_in_one_sentence_with_the_fix(installed, versions):
    installed(**versions)
    with pytest.raises(ImportError) as error:
        check()
    message = str(error.value)
    for distribution in ("apache-tvm", "apache-tvm-ffi"):
        found = versions.get(distribution, "(not installed)")
        assert f"{distribution} {found}" in message
    assert "\n" not in message and not re.search(r"\.\s", message)  # one sentence
    command = shlex.split(message.split("mend it with: ")[1])
    assert command == ["python", "-m", "pip", "install", *SUPPORTED[0].pins()]


@pytest.fixture
def relay_tvm(monkeypatch, tmp_path):
    """Pretend that `import tvm` would find a TVM built from source, with Relay, of a version."""

    def pretend(version: str) -> None:
        folder = tmp_path / "tvm"
        for room in ("relay", "_ffi"):
            (folder / room).mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").touch()
        (folder / "_ffi" / "libinfo.py").write_text(f'import os\n__version__ = "{version}"\n')
        spec = importlib.machinery.ModuleSpec("tvm", None, origin=str(folder / "__init__.py"))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)

    return pretend


@pytest.mark.parametrize("version", ["0.17.0", "0.17.dev0", "0.18.0", "0.19.0.post1"])
def test_relay_needs_no_distribution(installed, relay_tvm, version):
    relay_tvm(version)
    installed()
    assert check() == Pair(tvm=version, ffi=None)
    installed(**{"apache-tvm": version})
    assert check() == Pair(tvm=version, ffi=None)
    installed(**{"apache-tvm": version, "apache-tvm-ffi": "0.1.14.post1"})
    with pytest.raises(ImportError, match=r"or, for Relay, a TVM from 0\.17 on and before 0\.20"):
        check()


@pytest.mark.parametrize("version", ["0.16.0", "0.20.0", "1.17", "next"])
def test_other_relays_are_refused(installed, relay_tvm, version):
    relay_tvm(version)
    installed()
    with pytest.raises(ImportError, match=f"has apache-tvm {version} with"):
        check()


def test_a_tvm_without_relay_is_none(installed, relay_tvm, tmp_path):
    relay_tvm("0.17.0")
    (tmp_path / "tvm" / "relay").rmdir()
    installed()
    with pytest.raises(ImportError, match=r"apache-tvm \(not installed\)"):
        check()


@pytest.mark.parametrize("versions", [("", "0.1"), ("0.27", "")])
def test_empty_version_is_no_pair(versions):
    with pytest.raises(ValueError, match="empty"):
        Pair(*versions)


def test_check_loads_the_standard_library_only():
    program = (
        "import runpy, sys\n"
        f"runpy.run_path({str(SOURCE)!r}, run_name='requirements')['check']()\n"
        "print([name for name in ('tvm', 'tvm_ffi', 'numpy') if name in sys.modules])"
    )
    run = [sys.executable, "-c", program]
    assert subprocess.run(run, check=True, capture_output=True, text=True).stdout == "[]\n"


def test_setup_pins_the_first_pair_and_states_the_version_once():
    from topi_int8._version import __version__

    root = SOURCE.parents[1]
    program = (
        "import setuptools, sys, json\n"
        "setuptools.setup = lambda **keywords: print(json.dumps(keywords))\n"
        "sys.argv = ['setup.py']; exec(compile(open('setup.py').read(), 'setup.py', 'exec'),"
        " {'__file__': 'setup.py', '__name__': '__main__'})"
    )
    pytest.importorskip("setuptools", reason="setuptools is not installed: setup.py cannot be run")
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, check=True, capture_output=True, text=True, cwd=root)
    import json

    keywords = json.loads(done.stdout)
    assert keywords["version"] == __version__
    assert keywords["install_requires"][:2] == SUPPORTED[0].pins()
    assert {"topi_int8", "topi_int8.transform", "intrinsics"} <= set(keywords["packages"])
    assert not any(package.startswith("tests") for package in keywords["packages"])
