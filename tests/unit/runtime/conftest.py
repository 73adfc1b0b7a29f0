"""Small kernels in LLVM IR, and Python processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import flame.runtime

ROOT = str(Path(flame.runtime.__file__ or "").parents[2])

# count[i] += 1 for each iteration, so that one run twice or never shows.
COUNT = """
define void @count(ptr %args, i64 %begin, i64 %end, i64 %worker) {
entry:
  %counts = load ptr, ptr %args
  br label %head
head:
  %i = phi i64 [ %begin, %entry ], [ %next, %body ]
  %more = icmp slt i64 %i, %end
  br i1 %more, label %body, label %done
body:
  %slot = getelementptr i64, ptr %counts, i64 %i
  %old = load i64, ptr %slot
  %new = add i64 %old, 1
  store i64 %new, ptr %slot
  %next = add i64 %i, 1
  br label %head
done:
  ret void
}
"""

# out[begin] = (begin, end, worker) as three words.
WITNESS = """
define void @witness(ptr %args, i64 %begin, i64 %end, i64 %worker) {
  %out = load ptr, ptr %args
  %row = mul i64 %begin, 3
  %first = getelementptr i64, ptr %out, i64 %row
  store i64 %begin, ptr %first
  %second = getelementptr i64, ptr %first, i64 1
  store i64 %end, ptr %second
  %third = getelementptr i64, ptr %first, i64 2
  store i64 %worker, ptr %third
  ret void
}
"""

# out[i] = argument i + 1, for n arguments.
COPY = """
define void @copy(ptr %args, i64 %begin, i64 %end, i64 %worker) {
entry:
  %out = load ptr, ptr %args
  br label %head
head:
  %i = phi i64 [ %begin, %entry ], [ %next, %body ]
  %more = icmp slt i64 %i, %end
  br i1 %more, label %body, label %done
body:
  %next = add i64 %i, 1
  %from = getelementptr i64, ptr %args, i64 %next
  %value = load i64, ptr %from
  %to = getelementptr i64, ptr %out, i64 %i
  store i64 %value, ptr %to
  br label %head
done:
  ret void
}
"""

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_python() -> RunPython:
    """Run a program in a process of its own; fails the test where it does not exit with 0."""

    def run(program: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": ROOT, **variables}
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done

    return run
