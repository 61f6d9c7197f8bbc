"""Builds the compiled module ``customdiff_kernels._C`` with CMake and Ninja; torch is not needed to build.

``CUSTOMDIFF_CUDA=AUTO|ON|OFF`` says whether the CUDA kernels are built too: AUTO (default) where nvcc is
found, ON always, OFF never. ``CMAKE_ARGS`` (extra arguments for the configure step, such as
``-DCMAKE_CUDA_ARCHITECTURES=90``) and ``CMAKE_BUILD_PARALLEL_LEVEL`` are honoured.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures and builds with CMake, leaving the module where setuptools looks for it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        # pip's cmake and ninja lie beside python, whether or not that environment is activated.
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        cmake, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
        if cmake is None:
            raise RuntimeError("cmake was not found; `pip install cmake ninja` provides it")
        # setuptools may run with a relative path; for an editable install it lies beside the package.
        target = Path.cwd() / self.get_ext_fullpath(ext.name)
        # Not setuptools' build_temp, which is new for every editable install: a rebuild should be short.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCUSTOMDIFF_CUDA={os.environ.get('CUSTOMDIFF_CUDA', 'AUTO').upper()}",
        ]  # fmt: skip
        if ninja:  # named on every run: an isolated build's ninja is gone by the next one
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel"], check=True)


packages = {name: name.replace(".", "/") for name in find_packages(".", include=["customdiff_kernels*"])}
packages |= {name: f"python/{name.replace('.', '/')}" for name in find_packages("python")}

setup(
    packages=list(packages),
    package_dir=packages,
    package_data={
        "customdiff_kernels": ["py.typed", "**/MATH.md"],
        "tinysd": ["**/*.json", "**/*.txt", "**/*.safetensors", "**/*.png", "**/*.md"],
        "customdiff": ["**/*.json", "**/*.txt", "**/*.html"],
    },
    ext_modules=[Extension("customdiff_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
