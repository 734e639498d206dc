"""Build the one extension, nothing else; all metadata is in pyproject.toml.

Switches, read from the environment:
    NODEPASS_DEBUG=1                     abort on broken invariants, poison freed buffers
    NODEPASS_SANITIZE=address|thread     instrument the extension (scripts/sanitize)
    NODEPASS_WERROR=1                    the compiler's warnings are errors (scripts/check)
    NODEPASS_PURE=1                      build no extension; the Python twin is used
"""

import os
import sys

from setuptools import Extension, setup

SOURCE = "src/nodepass"
INCLUDED = (
    "sys", "atomic", "slab", "ring", "cell", "mail", "pipe", "loop", "flow", "tcp", "tls",
    "handshake", "udp", "gate", "link", "out", "raw", "order",
)  # fmt: skip

DIRECTIVES = {
    "language_level": 3,
    "cdivision": True,  # no ZeroDivisionError in code that cannot raise
    "boundscheck": False,
    "wraparound": False,
    "embedsignature": False,  # signatures come from binding=True; docstrings stay as written
    "binding": True,
    "c_api_binop_methods": False,
}

# Warnings are errors in our checks (NODEPASS_WERROR=1), not on a user's machine, whose compiler
# may know new ones. Those switched off are about what Cython generates, not about what we
# write: helpers emitted but not called, sign changes in its conversions, the many-headed
# type slots, and parameters of methods that take none.
COMPILE = [
    "-O2",
    "-fno-strict-aliasing",
    "-fstack-protector-strong",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-function",
    "-Wno-unused-parameter",
    "-Wno-sign-compare",
    "-Wno-missing-field-initializers",
    "-Wno-cast-function-type",
]
LINK = ["-Wl,-z,relro,-z,now", "-pthread"]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}


def engine() -> Extension:
    compile_args, link_args, macros = list(COMPILE), list(LINK), []
    sanitizer = os.environ.get("NODEPASS_SANITIZE", "")
    if sanitizer:
        compile_args += [*SANITIZERS[sanitizer], "-O1", "-g", "-fno-omit-frame-pointer"]
        link_args += SANITIZERS[sanitizer]
    else:
        compile_args += ["-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2"]
    if os.environ.get("NODEPASS_WERROR") == "1":
        compile_args.append("-Werror")
    if os.environ.get("NODEPASS_DEBUG") == "1":
        macros.append(("NODEPASS_DEBUG", "1"))
        compile_args.append("-g")
    return Extension(
        "nodepass._fastcopy",
        [f"{SOURCE}/_fastcopy.pyx"],
        depends=[
            f"{SOURCE}/_fastcopy.pxd",
            f"{SOURCE}/_linux.pxd",
            f"{SOURCE}/_openssl.pxd",
            *(f"{SOURCE}/fastcopy/{name}.pxi" for name in INCLUDED),
        ],
        define_macros=[("_GNU_SOURCE", "1"), *macros],
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )


def extensions() -> list[Extension]:
    # The engine is made of epoll, eventfd and splice: Linux. Elsewhere the twin works alone.
    # PyPy would pay more for crossing into C than the twin costs.
    is_native = sys.platform.startswith("linux") and sys.implementation.name == "cpython"
    if not is_native or os.environ.get("NODEPASS_PURE") == "1":
        return []
    from Cython.Build import cythonize

    return cythonize([engine()], include_path=["src"], compiler_directives=DIRECTIVES)


setup(ext_modules=extensions())
