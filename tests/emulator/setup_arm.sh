#!/usr/bin/env bash
# Installs what tests/emulator/arm.py needs on Debian: qemu-user and the ARM cross compilers (root
# only), and in build/emulator/arm/ an aarch64 Python with the TVM runtime (anybody). A second run
# does nothing.
set -euo pipefail
exec </dev/null

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$here/../.." && pwd)
pins=$repository/topi_int8/_requirements.py
arm=$repository/build/emulator/arm

missing=()
need() { # need PACKAGE COMMAND: PACKAGE is missing unless COMMAND is on the PATH
  command -v "$2" >/dev/null || [[ " ${missing[*]} " == *" $1 "* ]] || missing+=("$1")
}
need qemu-user qemu-aarch64
need qemu-user qemu-arm
need g++-aarch64-linux-gnu aarch64-linux-gnu-g++
need g++-arm-linux-gnueabihf arm-linux-gnueabihf-g++
if [ ${#missing[@]} -gt 0 ]; then
  if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed, and only root on a Debian may install them: ${missing[*]}" >&2
    exit 1
  fi
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi

# Everything below depends on this file and on the pins.
key=$(cat "${BASH_SOURCE[0]}" "$pins" | sha256sum | cut -c1-16)
if [ "$(cat "$arm/.installed" 2>/dev/null)" = "$key" ]; then
  echo "qemu: $(command -v qemu-aarch64), aarch64 Python: $arm (as it was)"
  exit 0
fi

mkdir -p "$arm"
work=$(mktemp -d "$arm/setup.XXXXXX")
trap 'rm -rf "$work"' EXIT

# apt with a state of its own: to this one the machine is an arm64 on which nothing is installed, so
# it fetches the packages with all they depend on, and the real machine's apt never hears of arm64.
mkdir -p "$work"/apt/{state/lists/partial,cache/archives/partial}
: >"$work/apt/status"
cat >"$work/apt/conf" <<EOF
Dir::State "$work/apt/state";
Dir::State::status "$work/apt/status";
Dir::Cache "$work/apt/cache";
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Sandbox::User "$(id -un)";
APT::Install-Recommends "false";
Binary::apt-get::APT::Keep-Downloaded-Packages "true";
Debug::NoLocking "true";
EOF
export APT_CONFIG=$work/apt/conf
apt-get update -qq
apt-get install -y -qq --download-only python3 libstdc++6 libgcc-s1
unset APT_CONFIG
mkdir "$work/sysroot"
for package in "$work"/apt/cache/archives/*.deb; do dpkg-deb -x "$package" "$work/sysroot"; done
interpreter=$(basename "$(readlink "$work/sysroot/usr/bin/python3")") # python3.11
version=${interpreter#python}

# The wheels, by any pip of this machine.
pip=()
for python in "$repository/.venv/bin/python" ${PYTHON:-} python3; do
  if "$python" -m pip --version >/dev/null 2>&1; then pip=("$python" -m pip) && break; fi
done
if [ ${#pip[@]} -eq 0 ]; then
  python3 -m venv "$work/venv"
  pip=("$work/venv/bin/python" -m pip)
fi
# As setup.py does: a dataclass looks its own module up, so the file is loaded by its folder.
tvm=$(cd "$repository/topi_int8" &&
  python3 -c 'import _requirements; print(*_requirements.SUPPORTED[0].pins())')
# cloudpickle, psutil and tornado are what TVM's RPC server imports.
# shellcheck disable=SC2086 # $tvm is two words
"${pip[@]}" install --quiet --no-input --disable-pip-version-check --no-compile \
  --target "$work/site" --only-binary=:all: --implementation cp --python-version "$version" \
  --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
  --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
  $tvm numpy ml_dtypes typing_extensions cloudpickle psutil tornado
rm -f "$work"/site/tvm/lib/libtvm_compiler.so # 250 MB; the server needs the runtime alone

# TVM starts further Pythons by sys.executable, so that is this script. Its own folder is found by
# its own path: it may be moved, and the emulated CPU is the caller's choice.
cat >"$work/python" <<EOF
#!/bin/sh
here=\$(cd "\$(dirname "\$0")" && pwd)
# LD_LIBRARY_PATH and the like would be the host's.
unset LD_LIBRARY_PATH LD_PRELOAD PYTHONSTARTUP VIRTUAL_ENV
export PYTHONHOME="\$here/sysroot/usr" PYTHONPATH="\$here/site" PYTHONDONTWRITEBYTECODE=
export TVM_USE_RUNTIME_LIB=1 # there is no compiler here
exec \${QEMU_LAUNCHER:-} qemu-aarch64 -cpu "\${QEMU_CPU:-max}" -L "\$here/sysroot" -0 "\$here/python" \\
  "\$here/sysroot/usr/bin/$interpreter" "\$@"
EOF
chmod +x "$work/python"

rm -rf "$arm/sysroot" "$arm/site" "$arm/python"
mv "$work/sysroot" "$work/site" "$work/python" "$arm/"
"$arm/python" -c 'import platform, tvm; assert platform.machine() == "aarch64"'
echo "$key" >"$arm/.installed"
echo "qemu: $(command -v qemu-aarch64), aarch64 Python: $arm"
