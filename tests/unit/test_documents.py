"""The code in the documents runs, and what they say it prints is what it prints."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of that language."""
    text = (ROOT / document).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def printed(code: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {"__name__": "document"})
    return out.getvalue()


def test_the_example_of_the_readme_learns() -> None:
    example, compiled = blocks("README.md", "python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    error = float(printed(example).split()[-1])
    assert error < 1e-3
    head, loop = example.split("for step in range(500):")
    last = loop.splitlines()[-1]
    calls = "for _ in range(500):\n    loss = step(x, y)\n"
    again = float(printed(f"{head}{compiled}\n{calls}{last}").split()[-1])
    assert again == pytest.approx(error, rel=0.05)


def test_the_texts_of_the_architecture_are_real() -> None:
    script = blocks("docs/architecture.md", "python")[0]
    out = printed(script)
    graph, kernel = (text for text in blocks("docs/architecture.md", "") if "tanh(" in text)
    assert graph in out
    assert kernel in out


@pytest.mark.parametrize("document", ["README.md", "docs/architecture.md"])
def test_the_files_that_documents_name_exist(document: str) -> None:
    text = (ROOT / document).read_text("utf-8")
    named = re.findall(r"[`(]((?:flame|docs|tests)/[\w./]+)[`)]", text)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_page_on_compiled_steps_is_real() -> None:
    (script,) = blocks("docs/compiler.md", "python")
    out = printed(script)
    (table,) = blocks("docs/compiler.md", "text")
    for line in table.splitlines():
        if "..." not in line:
            assert line.split() in [shown.split() for shown in out.splitlines()], line
