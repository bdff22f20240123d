# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""The ground floor: the one place that knows which TVM this is.

The kernel core (intrinsics, compute, schedule) runs on TVM 0.17 (Relay) and 0.25-0.27 (Relax). What
moved between them is reached only through the names here: `tir` (tvm.tir | tvm.tirx), `Schedule`,
`TensorIntrin`, `get_block`, `child_blocks`, and `parse_prim_func`, which reads TVMScript *text*.

Template tokens of that text: ``{PF}`` the prim_func decorator, ``{block}`` the block context, and
``{NSIG:n}`` the signature-count argument that call_llvm_intrin takes up to 0.2x only.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tvm

try:
    import tvm.s_tir as _s_tir
    import tvm.tirx as tir
    from tvm.script import tirx as T

    Schedule, TensorIntrin = _s_tir.Schedule, _s_tir.TensorIntrin
    Block, BlockRealize = _s_tir.SBlock, _s_tir.SBlockRealize
    Call, BufferLoad, ScheduleError = tvm.ir.Call, tvm.ir.TensorLoad, _s_tir.ScheduleError
    detect_linear_equation = tvm.sym.detect_linear_equation
    IS_RELAX = True
except ImportError:  # TVM <= 0.19
    from tvm import tir
    from tvm.script import tir as T

    Schedule, TensorIntrin = tir.Schedule, tir.TensorIntrin
    Block, BlockRealize = tir.Block, tir.BlockRealize
    Call, BufferLoad, ScheduleError = tir.Call, tir.BufferLoad, tir.ScheduleError
    detect_linear_equation = tvm.arith.detect_linear_equation
    IS_RELAX = False

# Whether kernels can be statements: those bind vectors to variables (`tir.Bind`).
STATES = IS_RELAX
SCHEDULED_ATTR = "tirx.is_scheduled" if IS_RELAX else "tir.is_scheduled"
NOALIAS_ATTR = "tirx.noalias" if IS_RELAX else "tir.noalias"


def parse_prim_func(text: str) -> Any:
    """Parse a PrimFunc from TVMScript text with this module's template tokens."""
    if IS_RELAX:
        text = text.replace("{PF}", "@T.prim_func(s_tir=True)").replace("{block}", "T.sblock")
        text = re.sub(r"\{NSIG:\d+\}\s*", "", text)
        # The parser inspects each frame of the stack, for milliseconds; a new thread has few.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(tvm.script.from_source, text, {"T": T, "tir": tir}).result()
    text = text.replace("{PF}", "@T.prim_func").replace("{block}", "T.block")
    text = re.sub(r"\{NSIG:(\d+)\}", r"T.uint32(\1),", text)
    return tvm.script.from_source(text, {"T": T, "tir": tir})


def get_block(sch: Any, name: str) -> Any:
    """Return the schedulable block of that name."""
    return sch.get_sblock(name) if IS_RELAX else sch.get_block(name)


def child_blocks(sch: Any) -> list[Any]:
    """Return the blocks under the root block, in program order."""
    return list(sch.get_child_blocks(get_block(sch, "root")))


def block_names(sch: Any) -> list[str]:
    """Return the names of the blocks under the root block, in program order."""
    return [sch.get(b).name_hint for b in child_blocks(sch)]


def llvm_major() -> int:
    """Return the major version of the LLVM this TVM was built with."""
    return int(tvm.target.codegen.llvm_version_major())


def dtype_of(expr: Any) -> str:
    """Return the element dtype of a scalar expression or a TE tensor's element."""
    expr = expr.asobject() if hasattr(expr, "asobject") else expr
    if hasattr(expr, "dtype"):
        return str(expr.dtype)
    return str(expr.ty.dtype)


def buffer_of(node: Any) -> Any:
    """Return the buffer of a BufferLoad or of a block's region."""
    return node.source if IS_RELAX else node.buffer


def lanes_of(vector: Any) -> int:
    """Return the number of elements of a vector expression."""
    return int(dtype_of(vector).partition("x")[2])


def shape_and_dtype(buffer: Any) -> tuple[tuple, str]:
    """Return a buffer's shape and element type."""
    typed = buffer.ty if IS_RELAX else buffer
    return tuple(typed.shape), str(typed.dtype)


def walk(node: Any, *visits: tuple[type, Callable[[Any], Any]]) -> None:
    """Call ``visit(node)`` on every node of that type in an expression or statement, in post order.
    """
    if IS_RELAX:
        import tvm_ffi

        def quiet(visit: Callable[[Any], Any]) -> Callable[[Any], None]:
            return lambda found: visit(found) and None

        handlers = [(kind, quiet(visit)) for kind, visit in visits]
        tvm_ffi.structural_walk(node, handlers, order="post")
        return

    def each(found: Any) -> None:
        for kind, visit in visits:
            if isinstance(found, kind):
                visit(found)

    tir.stmt_functor.post_order_visit(node, each)


def register_intrin(name: str, make: Callable[[], tuple[Any, Any]]) -> str:
    """Register the tensor intrinsic (desc, impl) unless one of that name is there; return the name.
    """
    if TensorIntrin.get(name, allow_missing=True) is None:
        TensorIntrin.register(name, *make())
    return name


def first_block(func: Any) -> Any:
    """Return the statement inside a parsed function's root block (or its body if it has none)."""
    body = func.body
    block = getattr(body, "block", None)
    if block is not None and block.name_hint == "root":
        return block.body
    return body


def call_statement(llvm_name: str, *args: Any) -> Any:
    """Return a statement that calls an LLVM intrinsic of no result."""
    ident = tvm.target.codegen.llvm_lookup_intrinsic_id(llvm_name)
    signature = [] if IS_RELAX else [tir.const(len(args), "uint32")]
    operands = tir.const(ident, "uint32"), *signature, *args
    return tir.Evaluate(tir.call_llvm_intrin("void", *operands))


def pure_call(llvm_name: str, dtype: str, *args: Any) -> Any:
    """Return a call of an LLVM intrinsic that has no side effects."""
    ident = tvm.target.codegen.llvm_lookup_intrinsic_id(llvm_name)
    signature = [] if IS_RELAX else [tir.const(len(args), "uint32")]
    return tir.call_llvm_pure_intrin(dtype, tir.const(ident, "uint32"), *signature, *args)


def extern_statement(name: str, *args: int) -> Any:
    """Return a statement that calls a C function with int64 arguments."""
    values = [tir.const(a, "int64") for a in args]
    return tir.Evaluate(tir.call_extern("int64", name, *values))


def i32(value: int) -> Any:
    """Return an int32 constant."""
    return tir.const(value, "int32")


def ramp(first: Any, count: int) -> Any:
    """Return the indices of `count` neighbours from `first` on."""
    return tir.Ramp(first, i32(1), count)


def prefetch(first: Any) -> Any:
    """Return the statement that fetches a line into the second-level cache (`prefetcht1`)."""
    operands = tir.address_of(first), *(i32(v) for v in (0, 2, 1))  # read, locality, data
    return call_statement("llvm.prefetch", *operands)


def scheduled(func: Any) -> Any:
    """Return a function that TVM is to leave as it is, with arguments that do not overlap."""
    return func.with_attr({SCHEDULED_ATTR: True, NOALIAS_ATTR: True})


def sequence(stmts: list[Any]) -> Any:
    """Return one statement of several (a SeqStmt has at least two)."""
    return stmts[0] if len(stmts) == 1 else tir.SeqStmt(stmts)


def loop(var: Any, extent: Any, body: list[Any], parallel: bool = False, first: int = 0) -> Any:
    """Return ``for var in range(first, first + extent)`` around statements."""
    kind = tir.ForKind.PARALLEL if parallel else tir.ForKind.SERIAL
    extent = i32(extent) if isinstance(extent, int) else extent
    return tir.For(var, i32(first), extent, kind, sequence(body), None, {})


def _rewritten(stmt: Any, make: Callable[[Any], Any]) -> Any:
    """Return the statement with each one inside it for which ``make(stmt)`` is not None replaced.
    """
    made = make(stmt)
    if made is not None:
        return made
    if isinstance(stmt, tir.SeqStmt):
        return tir.SeqStmt([_rewritten(inner, make) for inner in stmt])
    if isinstance(stmt, tir.For):
        return with_body(stmt, _rewritten(stmt.body, make))
    return stmt


def replace_annotated_loops(func: Any, key: str, make: Any) -> Any:
    """Return the function with each loop that has this annotation replaced by ``make(loop)``.

    Loops inside blocks other than the root are not looked at.
    """

    def replaced(stmt: Any) -> Any:
        return make(stmt) if isinstance(stmt, tir.For) and key in stmt.annotations else None

    def visit(stmts: list[Any]) -> list[Any]:
        return [_rewritten(stmt, replaced) for stmt in stmts]

    return func.with_body(rewrite_root(func.body, visit))


def _with_block_body(realize: Any, body: Any) -> Any:
    """Return the realized block with another body."""
    block = realize.block
    made = Block(
        block.iter_vars, block.reads, block.writes, block.name_hint, body,
        block.init, block.alloc_buffers, block.match_buffers, block.annotations,
    )  # fmt: skip
    return BlockRealize(realize.iter_values, realize.predicate, made)


def with_body(loop: Any, body: Any, extent: Any = None) -> Any:
    """Return the loop with another body (and extent)."""
    extent = loop.extent if extent is None else extent
    args = [loop.loop_var, loop.min, extent, loop.kind, body, loop.thread_binding]
    return tir.For(*args, loop.annotations)


def unknown_to_llvm(value: int) -> Any:
    """Return an int32 expression that is `value`, which LLVM cannot tell.

    The value, plus 65536 if this function had no return address: loops of a known bound are
    unrolled to it. LLVM has metadata for loops to leave alone; TVM emits none.
    """
    caller = pure_call("llvm.returnaddress", "handle", i32(0))
    # A Select, because TE's bounds can tell the smallest and the largest value of one.
    more = tir.Select(tir.isnullptr(caller), tir.const(65536, "int32"), tir.const(0, "int32"))
    return tir.const(value, "int32") + more


def rewrite_root(body: Any, rewrite: Any) -> Any:
    """Return a PrimFunc body whose root block's statements are ``rewrite([stmt, ...])``."""
    block = body.block
    stmts = list(block.body) if isinstance(block.body, tir.SeqStmt) else [block.body]
    return _with_block_body(body, sequence(rewrite(stmts)))
