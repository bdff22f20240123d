"""ARM assembly, read: functions, basic blocks, loops, and what an instruction multiplies and moves.

Understands what LLVM prints for aarch64 and for 32-bit ARM. Loops come from the control flow graph
(strongly connected components, taken apart from the outside in), never from the order of the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_CONDITIONS = "eq ne hs cs lo cc mi pl vs vc hi ls ge lt gt le al".split()
_BRANCH = re.compile(
    rf"(?:b|b\.(?:{'|'.join(_CONDITIONS)})|b(?:{'|'.join(_CONDITIONS)})|cbz|cbnz|tbz|tbnz)"
)
_LEAVES = re.compile(r"(?:b|ret|br|bx|udf|brk|trap)")
_CALLS = ("bl", "blr", "blx")
_LABEL = re.compile(r"([\w.$]+):")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its text, the mnemonic, and the operands as written."""

    text: str

    @property
    def mnemonic(self) -> str:
        """The mnemonic in lower case, with a type suffix (``vmlal.s8``) on 32-bit ARM."""
        return self.text.split(None, 1)[0].lower()

    @property
    def operands(self) -> str:
        """What follows the mnemonic."""
        return self.text.split(None, 1)[1] if " " in self.text else ""

    @property
    def target(self) -> str | None:
        """The label this branches to, or None."""
        if not _BRANCH.fullmatch(self.mnemonic):
            return None
        return self.operands.split(",")[-1].strip()

    @property
    def is_call(self) -> bool:
        """Whether this calls a function."""
        return self.mnemonic in _CALLS

    @property
    def ends_block(self) -> bool:
        """Whether control may leave the straight line here."""
        return self.target is not None or self.falls_through is False

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may be executed after this one."""
        if self.mnemonic == "pop" or self.mnemonic.startswith("ldm"):
            return not re.search(r"\bpc\b", self.operands)
        return not _LEAVES.fullmatch(self.mnemonic)


@dataclass(frozen=True)
class Block:
    """A basic block: its label (made up where it has none), instructions and successors."""

    label: str
    instructions: tuple[Instruction, ...]
    successors: tuple[str, ...]


@dataclass(frozen=True)
class Loop:
    """A loop: its header and its blocks in the order of the text, nested loops' blocks included."""

    header: str
    blocks: tuple[Block, ...]
    children: tuple[Loop, ...] = ()

    def walk(self) -> Iterator[Loop]:
        """Yield this loop and those inside it."""
        yield self
        for child in self.children:
            yield from child.walk()

    @property
    def instructions(self) -> tuple[Instruction, ...]:
        """Every instruction of the loop, in the order of the text."""
        return tuple(i for block in self.blocks for i in block.instructions)


@dataclass(frozen=True)
class Function:
    """A function: its blocks in the order of the text."""

    name: str
    blocks: tuple[Block, ...]
    _loops: list[Loop] = field(default_factory=list, repr=False, compare=False)

    @property
    def loops(self) -> list[Loop]:
        """The outermost loops."""
        if not self._loops:
            self._loops.extend(_find_loops(self.blocks))
        return self._loops

    @property
    def innermost(self) -> list[Loop]:
        """The loops that hold no loop."""
        every = (loop for outer in self.loops for loop in outer.walk())
        return [loop for loop in every if not loop.children]


def parse(asm: str) -> list[Function]:
    """Return the functions of an assembly file, those without a ``.type`` line under one name.

    A plain fragment (instructions and labels alone) is one function named "".
    """
    typed = set(re.findall(r"\.type\s+([\w.$]+)\s*,\s*[@%]function", asm))
    functions: list[tuple[str, list[tuple[str, list[Instruction]]]]] = [("", [("", [])])]
    count = 0
    for line in asm.splitlines():
        text = re.split(r"//|(?<!\S)@|/\*", line)[0].strip()
        if not text:
            continue
        label = _LABEL.match(text)
        if label:
            name, text = label.group(1), text[label.end() :].strip()
            if name in typed:
                functions.append((name, [(name, [])]))
            elif not re.match(r"\.L(tmp|func|_func|CPI|JTI|debug|info|cu_|str)", name):
                functions[-1][1].append((name, []))
        if not text or text.startswith("."):
            continue
        instruction = Instruction(re.sub(r"\s+", " ", text))
        blocks = functions[-1][1]
        blocks[-1][1].append(instruction)
        if instruction.ends_block:
            count += 1
            blocks.append((f".after{count}", []))
    return [f for f in (_function(name, blocks) for name, blocks in functions) if f.blocks]


def _function(name: str, raw: list[tuple[str, list[Instruction]]]) -> Function:
    blocks = []
    for index, (label, instructions) in enumerate(raw):
        following = raw[index + 1][0] if index + 1 < len(raw) else None
        successors = []
        last = instructions[-1] if instructions else None
        if last is not None and last.target is not None:
            successors.append(last.target)
        if following is not None and (last is None or last.falls_through):
            successors.append(following)
        blocks.append(Block(label, tuple(instructions), tuple(successors)))
    while blocks and not blocks[-1].instructions:
        blocks.pop()
    return Function(name, tuple(blocks) if any(b.instructions for b in blocks) else ())


def _find_loops(blocks: tuple[Block, ...]) -> list[Loop]:
    """Return the outermost loops of a set of blocks, each with the loops inside it."""
    by_label = {block.label: block for block in blocks}
    order = {block.label: index for index, block in enumerate(blocks)}
    edges = {b.label: [s for s in b.successors if s in by_label] for b in blocks}
    loops = []
    for component in _components(edges):
        members = set(component)
        first = min(component, key=order.__getitem__)
        if len(component) == 1 and first not in edges[first]:
            continue
        outside = [label for label in edges if label not in members]
        entries = {s for label in outside for s in edges[label] if s in members}
        # An irreducible loop has several entries; the first in the text stands for them.
        header = min(entries, key=order.__getitem__) if entries else first
        inside = tuple(by_label[label] for label in sorted(component, key=order.__getitem__))
        # Without the edges back to the header, what is left of the component are inner loops.
        cut = tuple(
            Block(b.label, b.instructions, tuple(s for s in b.successors if s != header))
            for b in inside
        )
        loops.append(Loop(header, inside, tuple(_find_loops(cut))))
    return sorted(loops, key=lambda loop: order[loop.blocks[0].label])


def _components(edges: dict[str, list[str]]) -> list[list[str]]:
    """Return the strongly connected components (Tarjan, without recursion)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    on_stack: set[str] = set()
    found: list[list[str]] = []
    for root in edges:
        if root in index:
            continue
        work = [(root, iter(edges[root]))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, successors = work[-1]
            for following in successors:
                if following not in index:
                    index[following] = low[following] = len(index)
                    stack.append(following)
                    on_stack.add(following)
                    work.append((following, iter(edges[following])))
                    break
                if following in on_stack:
                    low[node] = min(low[node], index[following])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    component = []
                    while not component or component[-1] != node:
                        component.append(stack.pop())
                        on_stack.discard(component[-1])
                    found.append(component)
    return found


# ---------------------------------------------------------------- what an instruction does

_VECTOR = re.compile(r"v\d+\.(\d+)([bhsd])")
_BITS = {"b": 8, "h": 16, "s": 32, "d": 64}
# Multiply-accumulates for each lane of the destination.
_PER_LANE = {
    **dict.fromkeys(("sdot", "udot", "usdot", "sudot"), 4),
    **dict.fromkeys(("smmla", "ummla", "usmmla"), 8),
    **dict.fromkeys(("bfdot",), 2),
    **dict.fromkeys(("bfmmla",), 4),
    **dict.fromkeys(
        "smull smull2 umull umull2 smlal smlal2 umlal umlal2 smlsl smlsl2 umlsl umlsl2 "
        "mla mls mul fmla fmls fmul".split(),
        1,
    ),
}
_SCALAR_MACS = {"fmadd", "fmsub", "fnmadd", "fnmsub"}
_ARM32_WIDENING = ("vmull", "vmlal", "vmlsl")
_ARM32_MACS = ("vmla", "vmls", "vmul", "vfma", "vfms", *_ARM32_WIDENING, "vsdot", "vudot")
# Sums of products that a multiply without a wide enough accumulator needs.
_SUMS = re.compile(r"[su](adalp|addlp)2?|[su]addw2?|vpadal\.\w+|vpaddl\.\w+|vaddw\.\w+")


def macs(instruction: Instruction) -> int:
    """Return the multiply-accumulates of one instruction.

    A vector multiply counts one for each lane of its destination, sdot four, smmla eight: sdot to
    ``.4s`` is 16, smmla 32, smull or smlal to ``.8h`` 8, fmla to ``.4s`` 4. Scalar integer
    multiplies are addresses, and count nothing.
    """
    name, operands = instruction.mnemonic, instruction.operands
    if name in _PER_LANE:
        found = _VECTOR.match(operands)
        return int(found.group(1)) * _PER_LANE[name] if found else 0
    if name in _SCALAR_MACS:
        return 1
    stem, _, suffix = name.partition(".")
    if stem in _ARM32_MACS and suffix:
        bits = int(re.sub(r"\D", "", suffix) or 8)
        if operands.startswith("s"):
            return 1
        register = 128 if operands.startswith("q") else 64
        if stem in _ARM32_WIDENING:
            return 64 // bits
        return register // 32 * 4 if stem in ("vsdot", "vudot") else register // bits
    return 0


def is_sum(instruction: Instruction) -> bool:
    """Whether this only adds up products: sadalp and its kin."""
    return bool(_SUMS.fullmatch(instruction.mnemonic)) and bool(
        re.match(r"[vqd]\d", instruction.operands)
    )


_ACCESS = re.compile(r"(ld|st)(n?p|ur|r|[1-4]|a|l|x)|v(ld|st)[1-4rm]|(vl|vs)dr|push|pop|ldm|stm")


def access(instruction: Instruction) -> str:
    """Return "load", "store" or "" for what an instruction does to memory."""
    name = instruction.mnemonic
    # Loads and stores of several registers name their base without brackets.
    several = re.match(r"v?(ld|st)m", name)
    if not _ACCESS.match(name) or ("[" not in instruction.operands and not several):
        return {"push": "store", "pop": "load"}.get(name, "")
    return "load" if name.startswith(("ld", "vld")) else "store"


def on_stack(instruction: Instruction, frame_pointer: bool = False) -> bool:
    """Whether this loads or stores at an address given by the stack (or frame) pointer.

    Inside an inner loop that is a spill: kernels reach their own scratch through other registers.
    """
    bases = r"sp|wsp|x29|fp|r11" if frame_pointer else r"sp|wsp"
    return bool(access(instruction)) and bool(
        re.search(rf"\[(?:{bases})\b", instruction.operands)
        or instruction.mnemonic in ("push", "pop")
    )


def has_frame_pointer(function: Function) -> bool:
    """Whether x29 (r11) addresses the function's frame rather than being one more register."""
    first = [i.text for block in function.blocks[:2] for i in block.instructions]
    return any(re.match(r"(mov|add) (x29|r11|fp), ?sp", text) for text in first)


_WIDTH = {"q": 16, "d": 8, "s": 4, "h": 2, "b": 1, "x": 8, "w": 4, "r": 4}


def moved_bytes(instruction: Instruction) -> int:
    """Return how many bytes a load or store moves (an estimate from its register names)."""
    if not access(instruction):
        return 0
    name, operands = instruction.mnemonic, instruction.operands
    if "{" in operands:
        body = operands[: operands.index("}") + 1]
        vectors = _VECTOR.findall(body)
        lanes = re.findall(r"v\d+\.([bhsd])\b(?=.*\}\[)", operands.split("[")[0] + "[")
        if lanes:
            return sum(_BITS[lane] // 8 for lane in lanes)
        size = sum(int(count) * _BITS[kind] // 8 for count, kind in vectors)
        if name.endswith("r") and vectors:
            return _BITS[vectors[0][1]] // 8
        return size or 8 * len(re.findall(r"\bd\d+", body))
    registers = operands.split("[")[0].split(",")
    count = 2 if name.startswith(("ldp", "ldnp", "stp", "stnp")) else 1
    if re.search(r"(b|h)$", name):
        return 1 if name.endswith("b") else 2
    return count * _WIDTH.get(registers[0].strip()[:1], 0)
