"""scripts/sanitize.sh with a stand-in for the sanitizer: shares, failures, time, the summary, what
is planted, and whose kernels are looked at."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda.host_compiler import kernels_of
from tests.gpu.planted_faults import FAULTS

ROOT = Path(__file__).parents[2]

# Runs the program as the sanitizer would. $FOUND: the errors that it claims to have found in tests;
# $STUCK: a test that it does not get past; $BLIND: a tool that finds no fault. Planted faults need
# a GPU, so it only looks whether it was asked to look at their kernels.
STAND_IN = r"""#!/usr/bin/env bash
echo "$@" >>"$GIVEN"
while [ "${1#--}" != "$1" ]; do
    [ "$1" != --log-file ] || report=${2/\%p/$$}
    [ "$1" != --tool ] || tool=$2
    [ "$1" != --kernel-name ] || ours=${2#regex=}
    shift 2
done
echo "========= COMPUTE-SANITIZER" >"$report"
if [ "$2 $3" = "-m tests.gpu.planted_faults" ]; then
    FOUND=0
    [ "$4" = "${BLIND:-}" ] || ! [[ planted_$4 =~ ${ours:-.} ]] || FOUND=1
    [ "$FOUND" = 0 ] || echo "=========     at planted_$4+0x70" >>"$report"
    echo "========= ERROR SUMMARY: $FOUND errors" >>"$report"
    echo "one kernel was launched"
    exit 99
fi
if [ -n "${STUCK:-}" ]; then
    echo "tests/test_seven.py::$STUCK"
    sleep 60
fi
output=$("$@")
status=$?
echo "$output"
if [[ $output = *" / 0 selected"* ]]; then
    echo "========= Error: Target application terminated before first API call" >>"$report"
    exit 255
fi
if [ "$tool" = racecheck ]; then
    echo "========= RACECHECK SUMMARY: 3 hazards displayed ($FOUND errors, 3 warnings)" >>"$report"
else
    echo "========= ERROR SUMMARY: $FOUND errors" >>"$report"
fi
[ "$FOUND" = 0 ] || status=99
exit $status
"""
TESTS = """
import os, pytest

@pytest.mark.parametrize("number", range(7))
def test_number(number):
    assert os.environ["FLAME_CUDA_POOL"] == "0"
    assert str(number) != os.environ.get("FAILS")
"""


def sanitize(folder: Path, *words: str, **environment: str) -> tuple[int, str]:
    """Exit status and output of the script over seven tests."""
    stand_in, tests = folder / "stand-in", folder / "test_seven.py"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    tests.write_text(TESTS)
    done = subprocess.run(
        [ROOT / "scripts" / "sanitize.sh", *words, "--logs", folder / "logs", "--", tests],
        env={
            **os.environ, "PYTHON": sys.executable, "SANITIZER": str(stand_in),
            "GIVEN": str(folder / "given"), "FOUND": "0", **environment,
        },
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_parts_share_the_tests(tmp_path: Path) -> None:
    status, told = sanitize(tmp_path, "--tools", "memcheck racecheck", "--jobs", "2")
    assert status == 0, told
    assert told.endswith("== all is well\n")
    for tool in ("memcheck", "racecheck"):
        ran: list[str] = []
        for part in (1, 2):
            text = (tmp_path / "logs" / f"{tool}.{part}.output").read_text()
            ran += [line.split()[0].rpartition("::")[2] for line in text.splitlines()
                    if " PASSED" in line]  # fmt: skip
            assert f"{tool} {part}/2: ok;" in told
        assert sorted(ran) == [f"test_number[{n}]" for n in range(7)]
        assert f"{tool}: finds the fault that is planted for it (1 errors reported)" in told
    given = (tmp_path / "given").read_text().splitlines()
    assert len(given) == 6
    assert all("--target-processes all --error-exitcode 99" in line for line in given)
    assert [("--kernel-name regex=" in line) for line in given] == [False] * 3 + [True] * 3
    assert [("planted_faults" in line) for line in given] == [True, False, False] * 2


def test_a_tool_that_misses_what_is_planted(tmp_path: Path) -> None:
    tools = ("--tools", "racecheck synccheck", "--jobs", "1")
    status, told = sanitize(tmp_path, *tools, BLIND="racecheck")
    assert status == 1
    missed = "racecheck: FAILED: it does not find the fault that is planted for it; exit status 99"
    assert f"{missed}; one kernel was launched\n" in told
    assert "racecheck 1/1" not in told
    assert "synccheck 1/1: ok; 7 passed" in told
    assert "== 1 parts FAILED" in told


def filters(folder: Path) -> dict[str, str]:
    """Tool -> the names of kernels that it is asked to look at."""
    status, told = sanitize(folder, "--tools", " ".join(FAULTS), "--jobs", "1")
    assert status == 0, told
    found = {}
    for line in (folder / "given").read_text().splitlines():
        words = line.split()
        if "tests.gpu.planted_faults" in words and "--kernel-name" in words:
            found[words[1]] = words[words.index("--kernel-name") + 1].removeprefix("regex=")
    return found


def test_our_kernels_alone_are_looked_at(tmp_path: Path) -> None:
    found = filters(tmp_path)
    assert list(found) == ["racecheck", "initcheck"]
    (pattern,) = set(found.values())
    assert "," not in pattern  # parts the sanitizer's filters
    assert not re.search(r"[(|][|)]", pattern)  # an empty name would let all through
    texts = [path.read_text() for path in (ROOT / "flame" / "kernels").glob("*.cu")]
    hand_written = [name for text in texts for name in kernels_of(text)]
    assert len(hand_written) == sum(text.count("__global__") for text in texts) > 15
    others = [f"planted_{tool}" for tool in FAULTS] + ["axpy", "square_called", "flame_add_3f"]
    for name in hand_written + others:
        assert re.search(pattern, name), name
        assert re.fullmatch(pattern, name), name
    for name in ("", "return", "cudnn_turn", "turn_kernel", "_called", "_Z10flame_copyPf", "void"):
        assert not re.search(pattern, name), name


def test_parts_without_tests(tmp_path: Path) -> None:
    status, told = sanitize(tmp_path, "--tools", "memcheck", "--jobs", "8")  # and seven tests
    assert status == 0, told
    assert "/8: ok; no test fell to this part" in told
    assert re.search(r"/8: ok; +\d passed", told)


def test_what_goes_wrong_is_told(tmp_path: Path) -> None:
    one = ("--tools", "memcheck", "--jobs", "1")
    status, told = sanitize(tmp_path, *one, FOUND="4")
    assert status == 1
    assert "memcheck 1/1: FAILED: the sanitizer found errors; 7 passed" in told
    assert "(4 errors reported)" in told
    status, told = sanitize(tmp_path, *one, FAILS="3")
    assert status == 1
    assert "memcheck 1/1: FAILED: exit status 1; 1 failed, 6 passed" in told
    status, told = sanitize(tmp_path, *one, "--limit", "1", STUCK="test_number[5]")
    assert status == 1
    assert "FAILED: out of time in" in told
    assert "test_number[5]" in told
    assert "(0 errors reported)" in told
    assert "== 1 parts FAILED" in told


def test_no_sanitizer(tmp_path: Path) -> None:
    status, told = sanitize(tmp_path, SANITIZER="/nowhere/compute-sanitizer")
    assert status == 2
    assert "comes with the CUDA toolkit" in told


@pytest.mark.parametrize("given", ["0/2", "3/2", "two"])
def test_a_wrong_shard(given: str, tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text("def test(): pass\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.shards", "--shard", given, tmp_path],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 4
    assert "--shard takes I/N" in done.stderr
