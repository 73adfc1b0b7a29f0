"""NVIDIA's driver class, over a library that stands in for the driver's."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flame.runtime.cuda.packages import include_directories

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("stub")
    source, library = HERE / "stub_libcuda.c", folder / "libcuda.so.1"
    options = [
        "-O1",
        "-shared",
        "-fPIC",
        f"-I{include_directories()[0]}",
        "-Wl,-soname,libcuda.so.1",
    ]
    subprocess.run([compiler, *options, "-o", library, source, "-ldl"], check=True)
    return folder


@pytest.mark.parametrize("pool", ["1", "0"])
def test_on_a_stub(stub: Path, pool: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", HERE / "on_stub.py"],
        env={**os.environ, "LD_LIBRARY_PATH": str(stub), "FLAME_CUDA_POOL": pool},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all well\n"
