"""Compiles the GPU kernels for GPUs that need not be there, and prints for each the most shared memory that one takes.

python tests/compile_kernels.py CAPABILITY:WIDTH:DTYPE …
"""

import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from supmer_ray.model import fused

ROWS = ["qkv", "bias", "out", "gradient", "back", "x", "delta", "weight", "total", "normed", "of_normed", "of_total"]
OTHERS = {"table": "*i32", "scale": "fp32", "eps": "fp32"} | dict.fromkeys(("scores", "along", "inverses"), "*fp32")


def shared_memory(kernel, capability, dtype, constants, options):
    """Bytes of shared memory of a program."""
    arguments = {name: f"*{dtype}" if name in ROWS else OTHERS.get(name, "i32") for name in kernel.arg_names}
    arguments |= dict.fromkeys(constants, "constexpr")
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    aligned = [name for name in kernel.arg_names if name in (*ROWS, "bias_head", "bias_row")]
    source = ASTSource(
        kernel,
        arguments,
        constexprs={places[name]: value for name, value in constants.items()},
        attrs={places[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared


def most_memory(capability, width, dtype):
    """Bytes of the kernel that takes most."""
    kind = {"bfloat16": "bf16", "float32": "fp32"}[dtype]
    kernels = {"forward": fused._forward, "keys": fused._backward_keys, "queries": fused._backward_queries}
    most = 0
    for longest in (3, 500):
        sizes = fused.block_sizes(longest, width, getattr(torch, dtype))
        for name, kernel in kernels.items():
            blocks = {key: value for key, value in sizes[name].items() if key.isupper()}
            constants = {"HEADS": 12, "WIDTH": width, "BIASED": True, **blocks}
            options = {key: value for key, value in sizes[name].items() if key not in blocks}
            most = max(most, shared_memory(kernel, capability, kind, constants, options))
    shared_memory(fused._along, capability, kind, {"HEADS": 12, "WIDTH": width, "ROWS": 64}, {})
    shared_memory(fused._add_norm, capability, kind, {"BLOCK": 1024}, {})
    shared_memory(fused._add_norm_backward, capability, kind, {"ADDED": True, "BLOCK": 1024}, {})
    return most


if __name__ == "__main__":
    for gpu in sys.argv[1:]:
        capability, width, dtype = gpu.split(":")
        print(gpu, most_memory(int(capability), int(width), dtype), flush=True)
