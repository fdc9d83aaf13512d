"""How kernels are compiled: by Numba, without the interpreter's lock, kept on disk. None starts threads of its own:
the callers' threads call kernels, so no threading layer is ever loaded."""

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

FAST = {"reassoc", "contract", "arcp", "nsz"}
"""Freedom that turns loops into vector code; NaN and infinity keep their meaning."""

_compile: Callable[..., Any] = partial(njit, nogil=True, cache=True, error_model="numpy")
exact_kernel = _compile()
"""For whole numbers, and where the last bit matters."""
kernel = _compile(fastmath=FAST)
kernel_without_nan = _compile(fastmath=True)
"""Where a wrong answer for NaN does no harm."""


@intrinsic
def fetch_ahead(typing: Any, array: Any, place: Any) -> Any:
    """Has the processor bring array[place] (one dim) near, without waiting for it."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind, byte, number = signature.args[0], ir.IntType(8).as_pointer(), ir.IntType(32)
        view = context.make_array(kind)(context, builder, arguments[0])
        at = cgutils.get_item_pointer(context, builder, kind, view, [arguments[1]], wraparound=False)
        order = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        prefetch = cgutils.get_or_insert_function(builder.module, order, "llvm.prefetch.p0i8")
        builder.call(prefetch, [builder.bitcast(at, byte), number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(array, place), build
