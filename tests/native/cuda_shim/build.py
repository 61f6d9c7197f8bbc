"""Builds the CUDA kernels for the CPU and loads them: ``load()``. Only what changed is compiled again."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11

SOURCE = Path(__file__).resolve().parent
BUILD = SOURCE.parents[2] / "build" / "cuda_shim"


def compiler() -> str | None:
    """The C++ compiler that CMake would take, if there is one."""
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    return next((found for name in names if name and (found := shutil.which(name.split()[0]))), None)


def _tool(name: str) -> str:
    found = shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))
    if not found:
        raise RuntimeError(f"{name} is needed; pip install {name}")
    return found


def load() -> ModuleType:
    if "_cuda_shim" in sys.modules:
        return sys.modules["_cuda_shim"]
    configure = [_tool("cmake"), "-S", SOURCE, "-B", BUILD, "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:  # another process may be building, too
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, [_tool("cmake"), "--build", BUILD]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"the kernels do not compile for the CPU:\n{done.stdout}{done.stderr}")
    file = BUILD / f"_cuda_shim{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("_cuda_shim", file)
    module = sys.modules["_cuda_shim"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
