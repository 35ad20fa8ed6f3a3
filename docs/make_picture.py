"""Draws docs/images/overview.png, the README's picture, with the curves of runs: `python docs/make_picture.py`.

devft quickstart && devft train --config fedit && devft train --config distilled
python docs/make_picture.py outputs/fedit outputs/quickstart outputs/distilled
"""

import argparse
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hf_devft import StageConfig
from hf_devft.run.comparison import read_curve
from hf_devft.run.plots import in_logarithms, megabytes_and_losses


PICTURE = Path(__file__).parent / "images" / "overview.png"
COLORS = [f"C{number}" for number in range(8)]
NAMES = {
    "fedit": "all 16 layers from the start (FedIT)",
    "quickstart": "stages of 4, 8 and 16 layers",
    "distilled": "4 layers for long, then 16, distilled",
}


def draw_stack(axes: Axes, left: float, heights: list[int], title: str) -> None:
    """Draw a model as layers on top of each other; heights: how many of the base's each stands for."""
    bottom = 0.0
    for number, height in enumerate(heights):
        color = COLORS[number % len(COLORS)]
        for layer in range(height):
            axes.add_patch(
                Rectangle((left, bottom + layer), 1.6, 0.85, color=color, alpha=0.75 if layer == 0 else 0.3)
            )
        bottom += height
    axes.text(left + 0.8, -1.0, title, ha="center", va="top", fontsize=8)


def draw_method(axes: Axes) -> None:
    """Draw the base, the submodels of its stages, and the clients that train them."""
    axes.set(xlim=(-0.4, 14.6), ylim=(-4.2, 19))
    axes.axis("off")
    draw_stack(axes, 0, [4] * 4, "the base,\n16 layers in groups")
    for number, (left, depth) in enumerate(((4.2, 4), (7.6, 8), (11.0, 16))):
        draw_stack(axes, left, [1] * depth, f"stage {number + 1}\n{depth} layers")
        for client in range(3):
            x, y = left - 0.3 + 1.1 * client, depth + 1.6
            axes.plot(x, y, "o", color="0.25", markersize=7)
            axes.annotate(
                "", (x, y - 0.2), (left + 0.8, depth + 0.1), arrowprops={"arrowstyle": "<->", "color": "0.5"}
            )
        axes.annotate("", (left - 0.2, 1.5), (left - 1.6, 1.5), arrowprops={"arrowstyle": "->", "lw": 1.5})
    axes.text(5.0, 7.4, "clients: only\nadapters travel", ha="center", fontsize=8)
    axes.text(2.0, 17.4, "Few layers first, each for a group.\nWhat they learn goes to all of it.", fontsize=8)


def draw_curves(axes: Axes, folders: list[Path]) -> None:
    """Draw loss against megabytes of runs that have ended."""
    for folder in folders:
        curve = read_curve(folder)
        name = NAMES.get(folder.name, f"{folder.name}, {StageConfig.from_pretrained(folder).num_stages} stages")
        style = {"color": "0.35", "ls": "--"} if folder.name == "fedit" else {}
        axes.plot(*megabytes_and_losses(curve), marker="o", ms=4, label=name, **style)
    axes.set(xlabel="MB sent (adapters, both ways)", ylabel="evaluation loss of the full model")
    in_logarithms(axes)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="their output folders")
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    method, curves = figure.subplots(1, 2)
    draw_method(method)
    draw_curves(curves, parser.parse_args().runs)
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
