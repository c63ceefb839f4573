"""Draw the curve of the README from the run folder of a quickstart.

python tools/docs/quickstart_curve.py --run RUN --out docs/quickstart.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 240, 44, 34, 14, 16
REWARD, ACCURACY = "reward/mean", "eval/arithmetic/accuracy"
Points = Sequence[tuple[int, float]]


def main(argv: Sequence[str] | None = None) -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    lines = [json.loads(line) for line in (args.run / "metrics.jsonl").read_text().splitlines()]
    args.out.write_text(picture(points(lines, REWARD), points(lines, ACCURACY)))


def points(lines: Sequence[dict[str, float]], key: str) -> Points:
    """Return the steps that have a metric, with its values."""
    return [(int(line["step"]), line[key]) for line in lines if key in line]


def picture(rewards: Points, accuracies: Points) -> str:
    """Return the curve as SVG: rewards of the responses that train, and dots of validation."""
    last = max(step for step, _ in [*rewards, *accuracies])

    def place(step: int, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        return x, HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * value

    def joined(drawn: Points) -> str:
        return " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in drawn)

    grid, labels = [], []
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        _, y = place(0, value)
        grid.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        labels.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for step in range(0, last + 1, 20):
        x, _ = place(step, 0)
        labels.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{step}</text>'
        )
    dots = [
        '<circle cx="{:.1f}" cy="{:.1f}" r="4" fill="#b3261e"/>'.format(*place(*point))
        for point in accuracies
    ]
    x, y = place(last // 2, 0.3)
    legend = [
        f'<path d="M{x:.0f} {y:.0f}h24" stroke="#1565c0" stroke-width="2"/>',
        f'<text x="{x + 32:.0f}" y="{y + 4:.0f}">reward of the responses that train</text>',
        f'<circle cx="{x + 12:.0f}" cy="{y + 20:.0f}" r="4" fill="#b3261e"/>',
        f'<text x="{x + 32:.0f}" y="{y + 24:.0f}">accuracy on held-out additions, greedy</text>',
    ]
    axis = f'<text x="{WIDTH / 2:.0f}" y="{HEIGHT - 2}" text-anchor="middle">step</text>'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        'font-family="sans-serif" font-size="12" fill="#333">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        *grid,
        f'<polyline points="{joined(rewards)}" fill="none" stroke="#1565c0" stroke-width="2"/>',
        f'<polyline points="{joined(accuracies)}" fill="none" stroke="#b3261e" '
        'stroke-dasharray="3 3"/>',
        *dots,
        *labels,
        *legend,
        axis,
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
