#!/bin/sh
# Installs what tests/emulator/bochs.py needs on Debian: Bochs, and a kernel image, which is only
# unpacked into build/emulator/ and not installed.  Needs root for apt-get install.
set -eu

build=$(cd "$(dirname "$0")/../.." && pwd)/build/emulator
mkdir -p "$build"

apt-get install -y --no-install-recommends bochs bochs-term bochsbios vgabios gcc libc6-dev binutils

if [ ! -s "$build/vmlinuz" ]; then
  # linux-image-amd64 is a meta package; its dependency is the image.
  package=$(apt-cache depends linux-image-amd64 |
    awk '$1 == "Depends:" && $2 ~ /^linux-image/ { print $2; exit }')
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  (cd "$work" && apt-get download "$package" && dpkg -x ./*.deb unpacked)
  cp "$work"/unpacked/boot/vmlinuz-* "$build/vmlinuz.new"
  mv "$build/vmlinuz.new" "$build/vmlinuz"
fi
echo "bochs: $(command -v bochs), kernel image: $build/vmlinuz"
