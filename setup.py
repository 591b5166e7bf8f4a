"""Packaging of megalith.

Four folders at the top are imported as one package: `engine/` is `megalith.engine`, and so on. A top-level import
called `kernels` would shadow the PyPI package of that name which transformers itself imports.
"""

import os
import platform

from setuptools import Extension, setup

PACKAGES = ["engine", "kernels", "rlhf", "bench"]

# The CPU kernels have a plain C ABI and are loaded with ctypes: the extension needs neither torch nor Python headers.
# -ffp-contract=off: a fused multiply-add would round once where the Triton twin rounds twice.
cpu_kernels = Extension(
    "megalith.kernels._cpu",
    sources=[os.path.join("kernels", name) for name in ("cpu_adam.cpp", "cpu_gptq.cpp", "cpu_rounding.cpp")],
    depends=[os.path.join("kernels", "cpu_common.h")],
    extra_compile_args=["-O3", "-std=c++17", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"],
    extra_link_args=["-fopenmp"],
    language="c++",
    optional=True,  # without a compiler the kernels fall back on torch operations
)

setup(
    name="megalith",
    version="0.1.0",
    description="Train and align language models far larger than the memory of the GPU",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[f"megalith.{name}" for name in PACKAGES],
    package_dir={f"megalith.{name}": name for name in PACKAGES},
    package_data={"megalith.kernels": ["*.cpp", "*.h"], "megalith.rlhf": ["page/*.html"]},
    ext_modules=[cpu_kernels] if platform.system() == "Linux" else [],
    install_requires=[
        "torch>=2.11",
        "triton>=3.6",
        "numpy",
        "safetensors>=0.5",
        "transformers>=5",
        "tokenizers",
        "peft>=0.17",
        "jinja2",
        "pyyaml",
        "tqdm",
        "tensorboard",
        "matplotlib",
        "psutil",
    ],
    extras_require={
        "datasets": ["datasets"],
        "serve": ["fastapi>=0.115", "uvicorn>=0.30", "prometheus-client"],
        "dev": ["pytest", "pytest-benchmark", "hypothesis", "ruff", "pre-commit", "openai", "httpx2", "selenium"],
    },
    entry_points={"console_scripts": ["megalith = megalith.rlhf.cli:main"]},
)
