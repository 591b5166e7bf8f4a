"""Compile a Triton kernel for a GPU that need not be there: what a test can know of GPU code without a GPU."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

ARCHITECTURES = (80, 90, 100)  # A100, H100 and H200, B200


def compile_ahead(kernel, arch: int, types: dict[str, str], constants: dict[str, object], **options) -> CompiledKernel:
    """Compile `kernel` (a `triton.jit` function) for CUDA compute capability `arch`, e.g. 90.

    `types` gives every run-time argument its type as Triton writes it ("*bf16", "i64", "fp32"), `constants` every other
    argument its value, and `options` are those of a launch. Pointers and integers are taken to be divisible by 16, as a
    launch finds them for whole buffers. The result's `asm` has "ttir", "ptx", "cubin" and others.
    """
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    divisible = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith(("*", "i"))
    }
    source = ASTSource(kernel, signature, constants, divisible)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
