"""Machines without CUDA's packages, driver or GPUs."""

import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import flame
from flame.core.errors import DeviceError
from flame.runtime.cuda import driver as drivers
from flame.runtime.cuda import info, nvidia, packages
from flame.runtime.storage import Storage

from .fake import FakeDriver


@pytest.fixture(autouse=True)
def no_driver() -> Iterator[None]:
    before = drivers.install_driver(None)
    yield
    drivers.install_driver(before)


def test_import_loads_nothing_of_cuda() -> None:
    program = """
import sys, flame, flame.nn, flame.optim
flame.tanh(flame.ones(3))
found = [m for m in sys.modules if m.split('.')[0] in ('cuda', 'nvmath', 'cudnn', 'nvidia')]
assert not found, found
flame.cuda.RawKernel
found = [m for m in sys.modules if m.split('.')[0] in ('cuda', 'nvmath', 'cudnn', 'nvidia')]
assert not found, found
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=120)


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "cuda.bindings", "cuda.bindings.driver", "cuda.pathfinder"):
        monkeypatch.setitem(sys.modules, name, None)


def test_missing_packages(no_packages: None) -> None:
    assert not flame.cuda.is_available()
    assert flame.cuda.device_count() == 0
    assert not flame.cuda.is_initialized()
    way_out = r"cuda-bindings.*pip install 'flame-engine\[cuda13\]'"
    for call in (
        flame.cuda.current_device,
        flame.cuda.synchronize,
        flame.cuda.Stream,
        flame.cuda.Event,
        flame.cuda.current_stream,
        flame.cuda.get_device_name,
        flame.cuda.get_device_properties,
        flame.cuda.memory_allocated,
        flame.cuda.memory_summary,
        flame.cuda.mem_get_info,
        flame.cuda.empty_cache,
        lambda: flame.cuda.set_device(0),
        lambda: flame.cuda.device(0).__enter__(),
        lambda: Storage.allocate(10, "cuda:0"),
        lambda: Storage.allocate_pinned(10),
    ):
        with pytest.raises(DeviceError, match=way_out):
            call()
    packages.include_directories.cache_clear()
    with pytest.raises(DeviceError, match=r"cuda-pathfinder.*pip install"):
        packages.include_directories()


def test_doctor_tells_of_missing_packages(
    no_packages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(info, "package_version", lambda name: None)
    told = info.info()
    assert "pip install 'flame-engine[cuda13]'" in told["cuda"]
    assert told["  cuda-bindings"] == "missing"


def test_doctor_tells_what_is_there(fake: FakeDriver) -> None:
    told = info.info()
    assert told["cuda"] == "available" or "packages are missing" in told["cuda"]
    assert told["  driver"] == "fake 1.0"
    assert told["  cuda:1"].startswith("Fake, compute capability 9.0, 4 multiprocessors, 1 GiB of")
    assert "0 entries" in told["  kernel cache"]


class Bindings:
    """As much of cuda.bindings.driver as start-up asks for."""

    CUmemPool_attribute = SimpleNamespace(CU_MEMPOOL_ATTR_RELEASE_THRESHOLD=4)

    def __init__(self, *, init: str = "", version: int = 13000, capability: int = 9) -> None:
        self.init, self.version, self.capability = init, version, capability

    def __getattr__(self, name: str) -> Any:
        if name.startswith("cu"):
            return lambda *_: (0, 0)
        raise AttributeError(name)

    def cuInit(self, flags: int) -> Any:
        if self.init == "missing":
            raise RuntimeError("libcuda.so.1 was not found")
        return (Status(self.init),)

    def cuDriverGetVersion(self) -> Any:
        return 0, self.version

    def cuDeviceGetCount(self) -> Any:
        return 0, 1

    def cuDeviceGetName(self, length: int, device: int) -> Any:
        return 0, b"Old\0\0"

    @property
    def CUdevice_attribute(self) -> Any:
        return Attributes()

    def cuDeviceGetAttribute(self, which: str, device: int) -> Any:
        return 0, self.capability if which.endswith("CAPABILITY_MAJOR") else 5


class Attributes:
    def __getattr__(self, name: str) -> str:
        return name


class Status(int):
    def __new__(cls, name: str) -> "Status":
        made = super().__new__(cls, bool(name))
        made.name = name
        return made

    name: str


@pytest.mark.parametrize(
    ("bindings", "words"),
    [
        (Bindings(init="missing"), r"needs NVIDIA's display driver.*--gpus all"),
        (Bindings(init="CUDA_ERROR_NO_DEVICE"), r"sees no GPU.*CUDA_VISIBLE_DEVICES"),
        (Bindings(init="CUDA_ERROR_UNKNOWN"), r"cuInit gave CUDA_ERROR_UNKNOWN.*nvidia-smi"),
        (Bindings(version=12040), r"supports CUDA 12\.4.*needs 13\.0 or newer.*580"),
    ],
)
def test_what_is_wrong_with_the_driver(
    monkeypatch: pytest.MonkeyPatch, bindings: Bindings, words: str
) -> None:
    monkeypatch.setattr(nvidia, "bindings", lambda name: bindings)
    assert not flame.cuda.is_available()
    with pytest.raises(DeviceError, match=words):
        flame.cuda.current_device()


def test_a_device_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "bindings", lambda name: Bindings(capability=7))
    with pytest.raises(DeviceError, match=r"cuda:0 \(Old\) has compute capability 7\.5; .*8\.0"):
        Storage.allocate(10, "cuda:0")
    assert "compute capability 7.5" in info.info()["  cuda:0"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_cannot_use_cuda() -> None:
    program = """
import os, sys
from flame.runtime.cuda.driver import driver, install_driver
from flame.core.errors import DeviceError
class Any:
    pass
install_driver(Any())
child = os.fork()
if not child:
    try:
        driver()
    except DeviceError as error:
        os._exit(0 if "spawn" in str(error) else 1)
    os._exit(2)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert isinstance(driver(), Any)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=120)
