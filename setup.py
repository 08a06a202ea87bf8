"""Builds runtime/_operators: kernels that our files call and ExecuTorch lacks, and C functions for Python. All else
stands in pyproject.toml.
"""

from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup

found = find_spec("executorch")
assert found, "executorch is needed for its headers: pip install executorch==1.5.*"
assert found.submodule_search_locations
EXECUTORCH = Path(found.submodule_search_locations[0])
FOLDER = Path("cpp_runner/src")
SOURCES = {
    "attention": ("attention.cpp", "bandwidth.cpp", "operator.cpp"),
    "linear": ("blocks.cpp", "experts.cpp", "linear.cpp", "operator.cpp"),
    "pte": ("program_check.cpp", "xnnpack_check.cpp"),
}
FILES = (*(f"{folder}/{name}" for folder, names in SOURCES.items() for name in names), "python_api.cpp")

setup(
    ext_modules=[
        Extension(
            "runtime._operators",
            [str(FOLDER / name) for name in FILES],
            depends=[
                *(str(path) for folder in SOURCES for path in FOLDER.glob(f"{folder}/*")),
                str(FOLDER / "python_api.h"),
                "cpp_runner/include/llama_runner/measure.h",
            ],
            include_dirs=[
                "cpp_runner/include",
                str(FOLDER),
                str(EXECUTORCH / "include"),
                str(EXECUTORCH / "include/executorch/runtime/core/portable_type/c10"),
            ],
            define_macros=[("C10_USING_CUSTOM_GENERATED_MACROS", None), ("ET_USE_THREADPOOL", None)],
            libraries=["executorch", "executorch_threadpool"],
            library_dirs=[str(EXECUTORCH / "lib")],
            extra_compile_args=["-std=c++20", "-O3", "-fvisibility=hidden"],
            language="c++",
        )
    ]
)
