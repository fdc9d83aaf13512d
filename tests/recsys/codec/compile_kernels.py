"""Compile the device's kernels for NVIDIA GPUs, without one: kernel, architecture, bytes of code, fused operations."""

import re

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from puna.recsys import gpu_kernels as kernels

POINTERS = {
    "value_ranges": ("*fp32", "*i32", "i32"),
    "add_noise": ("*fp32", "*i64", "*fp64", "*fp32", "i32"),
    "to_half": ("*fp32", "*fp16", "i32"),
    "from_half": ("*fp16", "*fp32", "i32"),
    "to_int8": ("*fp32", "*u8", "i32"),
    "from_int8": ("*u8", "*fp32", "i32"),
}
CODED, GRIDS = ("*i64", "*fp32"), (kernels.THROUGH_ZERO.value, kernels.WITH_BASE.value)


def cases():
    for name, types in POINTERS.items():
        yield name, types, {"BLOCK": 256}
    for kind in (kernels.CODES.value, *GRIDS):
        source = CODED[kind != kernels.CODES.value]
        for width in (0, 6, 15):
            yield (
                "encode_planes",
                (source, "*fp32", "*u8", "*u8", "i32", "i32"),
                {"WIDTH": width, "SOURCE": kind, "BLOCK": 256},
            )
            yield (
                "decode_planes",
                ("*u8", "*fp32", source, "*u8", "i32", "i32"),
                {"WIDTH": width, "TARGET": kind, "BLOCK": 256},
            )


def main():
    for name, types, constants in cases():
        kernel = getattr(kernels, name)
        names = kernel.arg_names[: len(types)]
        signature = dict(zip(names, types, strict=True)) | dict.fromkeys(constants, "constexpr")
        source = ASTSource(
            kernel, signature, {(kernel.arg_names.index(key),): value for key, value in constants.items()}
        )
        for arch in (80, 90):
            made = compile(source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": False})
            print(name, arch, len(made.asm["cubin"]), len(re.findall(r"\bfma\.", made.asm["ptx"])), flush=True)


main()
