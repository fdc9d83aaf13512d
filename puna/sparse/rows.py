"""Rows of numbers in kernels, 16 at a time: the vector code that compilers do not find, as arrays might overlap.

Numbers are float32 or bfloat16. NumPy has no bfloat16: an array of it is one of int16 with the same bits.
"""

from collections.abc import Callable
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from puna.sparse.compiled import exact_kernel

BLOCK = 16
_Build = Callable[[Any, Any, Any, Any], Any]


def array_of(x: Tensor) -> Any:
    """The tensor as kernels take it; no copy."""
    return x.view(torch.int16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def _block(lanes: int, combine: _Build) -> Any:
    """block(target, at, source, start, factor): target[at : at + lanes] = combine(builder, target's, source's, factor),
    computed in float32, rounded to the nearest; all is read before any is written, and no bounds are checked."""

    @intrinsic
    def block(typing: Any, target: Any, at: Any, source: Any, start: Any, factor: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            to, of = (_pointer(context, builder, signature, given, n, lanes) for n in (0, 2))
            old, new = (_widen(builder, builder.load(p, align=2), lanes) for p in (to, of))
            rate = builder.insert_element(ir.Constant(new.type, ir.Undefined), given[4], ir.IntType(32)(0))
            rate = builder.shuffle_vector(rate, rate, ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes))
            found = combine(builder, old, new, rate)
            builder.store(found if target.dtype == types.float32 else _narrow(builder, found, lanes), to, align=2)
            return context.get_dummy_value()

        return types.void(target, at, source, start, types.float32), build

    return block


@intrinsic
def mask_block(typing: Any, change: Any, at: Any, value: Any, start: Any, sums: Any, place: Any) -> Any:
    """change[at : at + 16] = 0 where value[start : start + 16] <= 0; sums[place : place + 16] (float32) += change."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        to, of, total = (_pointer(context, builder, signature, given, n, BLOCK) for n in (0, 2, 4))
        number = ir.VectorType(ir.FloatType(), BLOCK)
        passes = builder.fcmp_unordered(
            ">", _widen(builder, builder.load(of, align=2), BLOCK), ir.Constant(number, [0.0] * BLOCK)
        )
        old = builder.load(to, align=2)
        kept = builder.select(passes, old, ir.Constant(old.type, [0] * BLOCK))
        builder.store(kept, to, align=2)
        builder.store(builder.fadd(builder.load(total, align=4), _widen(builder, kept, BLOCK)), total, align=4)
        return context.get_dummy_value()

    return types.void(change, at, value, start, sums, place), build


def _pointer(context: Any, builder: Any, signature: Any, given: Any, n: int, lanes: int) -> Any:
    """To so many items of the array that is argument n, from the place on that is argument n + 1."""
    kind = signature.args[n]
    view = context.make_array(kind)(context, builder, given[n])
    pointer = cgutils.get_item_pointer(context, builder, kind, view, [given[n + 1]], wraparound=False)
    return builder.bitcast(pointer, ir.VectorType(pointer.type.pointee, lanes).as_pointer())


def _widen(builder: Any, x: Any, lanes: int) -> Any:
    if x.type.element == ir.FloatType():
        return x
    wide = ir.VectorType(ir.IntType(32), lanes)
    bits = builder.shl(builder.zext(x, wide), ir.Constant(wide, [16] * lanes))
    return builder.bitcast(bits, ir.VectorType(ir.FloatType(), lanes))


def _narrow(builder: Any, x: Any, lanes: int) -> Any:
    wide = ir.VectorType(ir.IntType(32), lanes)
    sixteen, one, most, nan = (ir.Constant(wide, [n] * lanes) for n in (16, 1, 0x7FFF, 0x7FC0))
    bits = builder.bitcast(x, wide)
    last = builder.and_(builder.lshr(bits, sixteen), one)
    nearest = builder.lshr(builder.add(builder.add(bits, most), last), sixteen)
    kept = builder.select(builder.fcmp_unordered("uno", x, x), nan, nearest)
    return builder.trunc(kept, ir.VectorType(ir.IntType(16), lanes))


def _copied(builder: Any, old: Any, new: Any, rate: Any) -> Any:
    return new


def _stepped(builder: Any, old: Any, new: Any, rate: Any) -> Any:
    return builder.fsub(old, builder.fmul(rate, new))


_copy_block, _copy_one = _block(BLOCK, _copied), _block(1, _copied)
_step_block, _step_one = _block(BLOCK, _stepped), _block(1, _stepped)


@exact_kernel
def copy_block(target: Any, at: int, source: Any, start: int) -> None:
    """target[at : at + 16] = source[start : start + 16]; arrays have one dim, here and below."""
    _copy_block(target, at, source, start, 0)


@exact_kernel
def copy_row(target: Any, at: int, source: Any, start: int, width: int) -> None:
    """target[at : at + width] = source[start : start + width]."""
    whole = width - width % BLOCK
    for c in range(0, whole, BLOCK):
        _copy_block(target, at + c, source, start + c, 0)
    for c in range(whole, width):
        _copy_one(target, at + c, source, start + c, 0)


@exact_kernel
def step_row(target: Any, at: int, source: Any, start: int, width: int, rate: Any) -> None:
    """target[at : at + width] -= rate x source[start : start + width]."""
    whole = width - width % BLOCK
    for c in range(0, whole, BLOCK):
        _step_block(target, at + c, source, start + c, rate)
    for c in range(whole, width):
        _step_one(target, at + c, source, start + c, rate)


@exact_kernel
def add_row(target: Any, at: int, source: Any, start: int, width: int) -> None:
    """target[at : at + width] += source[start : start + width]."""
    step_row(target, at, source, start, width, -1.0)
