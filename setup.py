"""Build the one extension; all metadata but the index page is in pyproject.toml.

Where nothing can be compiled the extension is left out and the Python twin does its work, which
it says at each start.

Switches, read from the environment:
    NODEPASS_DEBUG=1                     abort on broken invariants, poison freed buffers
    NODEPASS_SANITIZE=address|thread     instrument the extension (scripts/sanitize)
    NODEPASS_WERROR=1                    the compiler's warnings are errors (scripts/check)
    NODEPASS_PURE=1                      build no extension; the Python twin is used
    NODEPASS_NATIVE=1                    fail where the extension cannot be built
"""

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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
            f"{SOURCE}/_libssl.pxd",
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
    lack = missing()
    if lack:
        if os.environ.get("NODEPASS_NATIVE") == "1":
            sys.exit(f"nodepass: error: {lack}")
        print(
            f"nodepass: warning: {lack}; the slow Python engine is installed alone",
            file=sys.stderr,
        )
        return []
    from Cython.Build import cythonize

    return cythonize([engine()], include_path=["src"], compiler_directives=DIRECTIVES)


def missing() -> str | None:
    """Say what is missing to compile anything for this Python, None if nothing is."""
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()
    include = sysconfig.get_path("include")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "trial.c")
        source.write_text("#include <Python.h>\n#include <sys/epoll.h>\n")
        words = [*compiler, f"-I{include}", "-c", str(source), "-o", str(source.with_suffix(".o"))]
        try:
            trial = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603
        except OSError:
            return f"no C compiler ({compiler[0]}; Debian, Ubuntu and Alpine have it in gcc)"
    if trial.returncode == 0:
        return None
    if "Python.h" in trial.stderr:
        return f"no headers of this Python in {include} (python3-dev)"
    if ".h" in trial.stderr:
        return "no headers of the C library (Debian, Ubuntu: libc6-dev, Alpine: musl-dev)"
    return f"the C compiler {compiler[0]} does not work"


class BuildEngine(build_ext):
    """As usual; a failure ends with the line that says how to go without."""

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except Exception:
            print(
                "nodepass: error: the native engine does not compile here; NODEPASS_PURE=1 in the "
                "environment installs the slow Python engine alone",
                file=sys.stderr,
            )
            raise


def index_page() -> str:
    """The README without what leads nowhere outside the checkout: pictures and links to files."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    text = re.sub(r"^\[[^\]]*\]\((?!https?:)[^)]*\)\n\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", text)


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildEngine},
    long_description=index_page(),
    long_description_content_type="text/markdown",
)
