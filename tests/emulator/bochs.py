"""Running a program in Bochs: a whole emulated PC whose CPU has AVX-512 (and AVX512-VNNI).

``run(program, args, files)`` boots a Debian kernel with an initramfs made of the program, the given
files and all shared libraries they need, and returns what the program printed.  Debian's bochs
package suffices for AVX-512 (CPU model corei7_icelake_u); ``setup_bochs.sh`` installs it and puts a
kernel image into build/emulator/.  A newer Bochs may be named with $BOCHS, its CPU model with
$BOCHS_CPU (for example sapphire_rapids, which has AMX and AVX-VNNI), another kernel image with
$BOCHS_KERNEL, further kernel arguments (such as ignore_loglevel) with $BOCHS_APPEND.

Booting is made short: no boot loader, no file system, no decompression.  The disk is a boot
sector (guest/boot.S) and behind it an image of the memory as the kernel wants it: page tables,
boot_params, the uncompressed kernel, the initramfs.  The boot sector reads all that, switches to
64-bit mode and jumps to the kernel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import lzma
import os
import pty
import re
import shutil
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import BUILD_DIR, HERE, EmulatorError, compile_cached, runtime_libraries

GUEST = HERE / "guest"

# The guest's physical memory.  TABLES is below the kernel, which is linked to run at 16 MiB.
TABLES = 0xF00000
PARAMS = TABLES + 0x3000
COMMAND_LINE = TABLES + 0x4000
MEMORY_MIB = 512

# Nothing here changes what a user program computes; it only shortens the boot.  lpj and
# tsc=reliable save calibrations that wait for emulated time to pass.
KERNEL_ARGUMENTS = (
    "console=ttyS0 rdinit=/init quiet nokaslr mitigations=off tsc=reliable lpj=8000 "
    "init_on_alloc=0 cryptomgr.notests audit=0 selinux=0 apparmor=0 nowatchdog "
    "i8042.noaux i8042.nokbd i8042.nopnp 8250.nr_uarts=1 pci=off noapic panic=-1 "
    "random.trust_cpu=on no_timer_check"
)

# CPU features hidden from Linux (numbers: word * 32 + bit of its cpufeatures.h).
# FSRM (fast short rep mov): Bochs does not report fast strings in MSR_MISC_ENABLE, so Linux drops
# ERMS but keeps FSRM, a combination in which Linux 6.1's memmove runs wild on short copies.
HIDDEN_FEATURES = [580]
# PKU, OSPKE, XSAVEC, XSAVES: Bochs 2.x reports wrong sizes for their part of the XSAVE area, and
# Linux then gives up XSAVE, and with it AVX and AVX-512, altogether.
HIDDEN_FEATURES_2X = [515, 516, 321, 323]


@dataclasses.dataclass
class Result:
    """What a program did in the emulated machine."""

    exit_code: int  # negative: ended by that signal
    output: str  # stdout and stderr, in order
    seconds: float  # of wall time, boot included


def bochs_binary() -> str | None:
    """$BOCHS or the bochs of the PATH."""
    return shutil.which(os.environ.get("BOCHS", "bochs"))


def kernel_image() -> Path | None:
    """$BOCHS_KERNEL or the image that setup_bochs.sh stored."""
    path = Path(os.environ.get("BOCHS_KERNEL", BUILD_DIR / "vmlinuz"))
    return path if path.exists() else None


def _help(binary: str, *options: str) -> str:
    command = [binary, *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


def problem(model: str = "corei7_icelake_u") -> str | None:
    """Why programs cannot be run on a CPU of this model here, or None if they can."""
    binary = bochs_binary()
    recipe = "tests/emulator/setup_bochs.sh (as root) installs it"
    if binary is None:
        return f"bochs is not installed; {recipe}"
    if model not in _help(binary, "-help", "cpu").split():
        return f"{binary} has no CPU model {model}"
    if kernel_image() is None:
        return f"there is no kernel image {BUILD_DIR / 'vmlinuz'}; {recipe}"
    for tool in ("gcc", "objcopy", "ldd"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    return None


# ---------------------------------------------------------------- the memory images


def _uncompressed_kernel(image: bytes) -> bytes:
    """The ELF file inside a bzImage that is compressed with xz, as Debian's are."""
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    payload = image[(setup_sectors + 1) * 512 + offset :][:length]
    if not payload.startswith(b"\xfd7zXZ"):
        raise EmulatorError("this kernel image is not compressed with xz")
    return lzma.LZMADecompressor().decompress(payload)


def _lay_out(elf: bytes) -> tuple[int, int, bytes]:
    """(start, entry, memory) of an ELF kernel's segments at their physical addresses."""
    entry, header_offset = struct.unpack_from("<QQ", elf, 24)
    (count,) = struct.unpack_from("<H", elf, 56)
    segments = []
    for i in range(count):
        kind, _, offset, _, paddr, size, memsize, _ = struct.unpack_from(
            "<IIQQQQQQ", elf, header_offset + 56 * i
        )
        if kind == 1:  # PT_LOAD
            segments.append((paddr, memsize, elf[offset : offset + size]))
    start = min(s[0] for s in segments)
    memory = bytearray(max(s[0] + s[1] for s in segments) - start)
    for paddr, _, data in segments:
        memory[paddr - start : paddr - start + len(data)] = data
    return start, entry, bytes(memory)


def _page_tables() -> bytes:
    """An identity mapping of the first GiB: one PML4, one PDPT, one PD of 2 MiB pages."""
    pml4 = struct.pack("<Q", (TABLES + 0x1000) | 3).ljust(4096, b"\0")
    pdpt = struct.pack("<Q", (TABLES + 0x2000) | 3).ljust(4096, b"\0")
    return pml4 + pdpt + b"".join(struct.pack("<Q", i << 21 | 0x83) for i in range(512))


def _boot_params(image: bytes, ramdisk: int, ramdisk_size: int) -> bytes:
    """Linux's boot_params (Documentation/x86/boot.rst): what a boot loader hands over."""
    params = bytearray(4096)
    end = 0x202 + image[0x201]
    params[0x1F1:end] = image[0x1F1:end]  # the setup header, as it is in the image
    params[0x210] = 0xFF  # type_of_loader: none that has a number
    struct.pack_into("<II", params, 0x218, ramdisk, ramdisk_size)
    struct.pack_into("<I", params, 0x228, COMMAND_LINE)
    memory_map = [(0, 0x9F000), (0x100000, (MEMORY_MIB << 20) - 0x100000 - 0x100000)]
    params[0x1E8] = len(memory_map)
    for i, (start, size) in enumerate(memory_map):
        struct.pack_into("<QQI", params, 0x2D0 + 20 * i, start, size, 1)
    return bytes(params)


def _cpio_entry(name: str, mode: int, data: bytes = b"") -> bytes:
    fields = [0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
    entry = b"070701" + b"".join(b"%08X" % f for f in fields) + name.encode() + b"\0"
    entry += bytes(-len(entry) % 4) + data
    return entry + bytes(-len(entry) % 4)


def make_initramfs(files: Mapping[str, bytes]) -> bytes:
    """An uncompressed newc archive of executable files, named by their absolute paths."""
    directories = {"dev", "proc", "tmp"}
    for path in files:
        directories.update(str(p).lstrip("/") for p in Path(path).parents if p != Path("/"))
    archive = [_cpio_entry(d, 0o040755) for d in sorted(directories)]
    archive += [_cpio_entry(p.lstrip("/"), 0o100755, data) for p, data in files.items()]
    return b"".join(archive) + _cpio_entry("TRAILER!!!", 0)


def needed_libraries(binaries: Sequence[Path]) -> dict[str, Path]:
    """All shared libraries the given ELF files need: guest path -> host path."""
    search = ":".join(str(lib.parent) for lib in runtime_libraries())
    env = {**os.environ, "LD_LIBRARY_PATH": search}
    needed: dict[str, Path] = {}
    for binary in binaries:
        done = subprocess.run(
            ["ldd", str(binary)], check=False, capture_output=True, text=True, env=env
        )
        if "not found" in done.stdout:
            raise EmulatorError(f"ldd {binary}:\n{done.stdout}")
        for path in re.findall(r"(?:=> |^\s)(/\S+) \(0x", done.stdout, re.M):
            guest = path if "ld-linux" in path else "/lib/" + Path(path).name
            needed[guest] = Path(path).resolve()
    return needed


def _initramfs(program: Path, args: Sequence[str], files: Mapping[str, Path]) -> bytes:
    init = compile_cached("gcc", GUEST / "init.c", ["-O2", "-static"], "")
    binaries = [program, *(f for f in files.values() if f.suffix == ".so")]
    content = {"/init": init.read_bytes(), "/run/program": program.read_bytes()}
    content["/run/command"] = b"".join(a.encode() + b"\0" for a in ["/run/program", *args])
    for path, source in {**needed_libraries(binaries), **files}.items():
        content[path] = source.read_bytes()
    return make_initramfs(content)


def _boot_sector(entry: int, sectors: int) -> bytes:
    defines = [f"-DTABLES={TABLES:#x}", f"-DPARAMS={PARAMS:#x}", f"-DENTRY={entry:#x}"]
    link = ["-nostdlib", "-static", "-Wl,--oformat=binary", "-Wl,-Ttext=0x7c00", "-Wl,-e,_start"]
    flags = [*link, "-Wl,--build-id=none", *defines, f"-DSECTORS={sectors}"]
    return compile_cached("gcc", GUEST / "boot.S", flags, ".bin").read_bytes()


def _kernel_arguments(binary: str) -> str:
    hidden = list(HIDDEN_FEATURES)
    if "Bochs x86 Emulator 2." in _help(binary, "--help"):
        hidden += HIDDEN_FEATURES_2X
    features = ",".join(map(str, hidden))
    return f"{KERNEL_ARGUMENTS} clearcpuid={features} {os.environ.get('BOCHS_APPEND', '')}"


def make_disk(image: bytes, initramfs: bytes, arguments: str) -> bytes:
    """The bootable disk for a kernel image and an initramfs."""
    start, entry, kernel = _lay_out(_uncompressed_kernel(image))
    ramdisk = (start + len(kernel) + 0x1FFFFF) & ~0x1FFFFF
    if ramdisk + len(initramfs) > (MEMORY_MIB - 64) << 20:
        raise EmulatorError("the files do not fit into the emulated machine's memory")
    memory = _page_tables() + _boot_params(image, ramdisk, len(initramfs))
    memory += arguments.encode() + b"\0"
    memory = memory.ljust(start - TABLES, b"\0") + kernel
    memory = memory.ljust(ramdisk - TABLES, b"\0") + initramfs
    memory += bytes(-len(memory) % (256 * 512))  # the boot sector reads 256 sectors at a time
    disk = _boot_sector(entry, len(memory) // 512) + memory
    return disk + bytes(-len(disk) % (16 * 63 * 512))  # whole cylinders


# ---------------------------------------------------------------- the machine


def _bochsrc(folder: Path, model: str) -> str:
    # Debian's Bochs has no "nogui"; its "term" draws into a pseudo-terminal that nobody looks at.
    cylinders = (folder / "disk").stat().st_size // (16 * 63 * 512)
    return f"""
display_library: {os.environ.get("BOCHS_DISPLAY", "term")}
cpu: model={model}, count=1, ips=20000000, reset_on_triple_fault=0
memory: guest={MEMORY_MIB}, host={MEMORY_MIB}
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=disk, path={folder}/disk, mode=flat, heads=16, spt=63, cylinders={cylinders}
boot: disk
com1: enabled=1, mode=file, dev={folder}/serial
clock: sync=none, time0=1700000000
log: {folder}/log
panic: action=fatal
error: action=report
info: action=report
debug: action=ignore
speaker: enabled=0
mouse: enabled=0
"""


def _drain(fd: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(fd, 65536):
            pass


def _run_machine(folder: Path, binary: str, timeout: float) -> None:
    """Runs Bochs until the guest ends it, the time is up, or the kernel panics."""
    serial = folder / "serial"
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": "vt100"}
    command = [binary, "-q", "-f", str(folder / "bochsrc")]
    if _help(binary, "--help").find("-rc filename") >= 0:
        # Debian's Bochs is built with its debugger, which waits to be told to continue
        (folder / "debugger").write_text("c\n")
        command += ["-rc", str(folder / "debugger")]
    process = subprocess.Popen(
        command,
        stdin=slave, stdout=slave, stderr=slave, env=env, cwd=folder, start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    threading.Thread(target=_drain, args=(master,), daemon=True).start()
    deadline = time.monotonic() + timeout
    try:
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
            text = serial.read_bytes() if serial.exists() else b""
            if re.search(rb"@@BOCHS-(END -?\d+|ERROR.*)@@|Kernel panic", text):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(2)
                break
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(master)


def run(
    program: Path,
    args: Sequence[str] = (),
    files: Mapping[str, Path] | None = None,
    model: str | None = None,
    timeout: float = 600,
    keep: Path | None = None,
) -> Result:
    """Runs an x86-64 Linux program in Bochs.

    ``files`` maps absolute guest paths to files of this machine; shared libraries that the program
    and the ``.so`` files among them link to are added.  With ``keep`` the machine's files (log,
    serial output, configuration) are left in that folder.
    """
    model = model or os.environ.get("BOCHS_CPU", "corei7_icelake_u")
    why = problem(model)
    if why:
        raise EmulatorError(why)
    begin = time.monotonic()
    binary, image_path = bochs_binary(), kernel_image()
    assert binary and image_path
    disk = make_disk(
        image_path.read_bytes(),
        _initramfs(program, args, files or {}),
        _kernel_arguments(binary),
    )
    with contextlib.ExitStack() as stack:
        if keep is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bochs-")))
        else:
            folder = keep
            folder.mkdir(parents=True, exist_ok=True)
        (folder / "disk").write_bytes(disk)
        (folder / "disk.lock").unlink(missing_ok=True)  # of a machine that was killed
        (folder / "serial").write_bytes(b"")
        (folder / "bochsrc").write_text(_bochsrc(folder, model))
        _run_machine(folder, binary, timeout)
        text = (folder / "serial").read_text(errors="replace").replace("\r\n", "\n")
        log = folder / "log"
        log_tail = log.read_text(errors="replace")[-3000:] if log.exists() else "(none)"
    done = re.search(r"@@BOCHS-BEGIN@@\n(.*)@@BOCHS-END (-?\d+)@@", text, re.S)
    seconds = time.monotonic() - begin
    if not done:
        raise EmulatorError(
            f"the program did not end in Bochs within {seconds:.0f} s.\n"
            f"serial port:\n{text[-3000:]}\nBochs log:\n{log_tail}"
        )
    return Result(int(done[2]), done[1], seconds)
