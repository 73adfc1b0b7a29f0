"""What is planted for compute-sanitizer's tools is wrong indeed: the emulation refuses what it sees
of it. It runs threads one after the other and gives memory a content, so that a race and a read of
what nobody wrote go by here."""

from __future__ import annotations

import pytest

from flame.core.errors import CudaError
from tests.gpu.planted_faults import commit

pytestmark = pytest.mark.usefixtures("eager_cuda")


@pytest.mark.parametrize(
    ("tool", "refusal"),
    [("memcheck", "a write after the allocation"), ("synccheck", "whose mask lacks it")],
)
def test_faults_that_the_emulation_sees(tool: str, refusal: str) -> None:
    with pytest.raises(CudaError, match=f"planted_{tool}: .*{refusal}"):
        commit(tool)


@pytest.mark.parametrize("tool", ["racecheck", "initcheck"])
def test_faults_that_do_no_harm(tool: str) -> None:
    commit(tool)
