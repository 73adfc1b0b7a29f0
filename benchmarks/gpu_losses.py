"""Whether two libraries computed the same training: a benchmark of a wrong one is worthless."""

from __future__ import annotations

REFERENCE = "torch eager"
FALL = 0.25  # by how much the fall of the loss may differ, of it


def agreement(losses: dict[str, list[float]], *, mixed: bool) -> tuple[str, list[str]]:
    """(verdict, the losses in words) of the first losses of each kind.

    Each must be within a tolerance of PyTorch's eager one; and over all of them the loss must have
    fallen as far, where it fell by more than the tolerance: a wrong gradient hardly changes a loss,
    but its fall.
    """
    notes = [
        f"losses of {kind}: {', '.join(f'{loss:.5f}' for loss in found)}"
        for kind, found in losses.items()
    ]
    if REFERENCE not in losses or len(losses) < 2:
        return "not compared", notes
    reference = losses[REFERENCE]
    wrong = [
        kind
        for kind, found in losses.items()
        if kind != REFERENCE and not same(found, reference, 1e-2 if mixed else 1e-4)
    ]
    return (f"**NO**: {', '.join(wrong)}" if wrong else "yes"), notes


def same(losses: list[float], reference: list[float], tolerance: float) -> bool:
    """Whether two courses of training agree. False where a loss is not a number."""
    near = all(
        abs(a - b) <= tolerance * max(abs(b), 1e-3) for a, b in zip(losses, reference, strict=True)
    )
    fall, expected = losses[0] - losses[-1], reference[0] - reference[-1]
    if abs(expected) <= tolerance * abs(reference[0]):
        return near
    return near and abs(fall - expected) <= FALL * abs(expected)
