"""The page of the Wan family shows the table of flavours as the code has it."""

from __future__ import annotations

from pathlib import Path

from tuner_wan.flavours import FLAVOURS, Flavour

PAGE = Path(__file__).parents[2] / "docs" / "wan.md"
GIVEN = {
    "none": "text",
    "first_frame": "text, first frame",
    "first_and_last_frame": "text, first and last frame",
    "clean_first_frame": "text, first frame if wanted",
}


def row(flavour: Flavour) -> str:
    """One line of the table."""
    trained = {None: "", "high": "high noise", "low": "low noise", "both": "both in turn"}[flavour.expert]
    if flavour.boundary is not None:
        trained += f", boundary {flavour.boundary:g}"
    guidance = f"{flavour.guidance:g}" + (f" / {flavour.guidance_2:g}" if flavour.guidance_2 is not None else "")
    size = f"{flavour.size[0]}x{flavour.size[1]}"
    cells = (
        f"`{flavour.name}`",
        flavour.repository.removeprefix("Wan-AI/"),
        GIVEN[flavour.condition],
        trained,
        size,
        f"{flavour.fps:g}",
        str(flavour.steps),
        guidance,
        f"{flavour.flow_shift:g}",
    )
    return f"| {' | '.join(cells)} |"


def test_the_table_has_every_flavour_as_it_is() -> None:
    text = PAGE.read_text(encoding="utf-8")
    missing = [row(flavour) for flavour in FLAVOURS.values() if row(flavour) not in text]
    assert not missing, "\n".join(missing)
