"""Draws the pictures of docs/concepts.md, images/round.png and stage.png: `python docs/make_concept_pictures.py`."""

from make_picture import COLORS, PICTURE, draw_stack
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle


CLIENTS = ("client 4", "client 11", "client 17")


def draw_box(axes: Axes, left: float, bottom: float, width: float, height: float, text: str, color: str) -> None:
    axes.add_patch(
        FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0.1", facecolor=color, edgecolor="0.4")
    )
    axes.text(left + width / 2, bottom + height / 2, text, ha="center", va="center", fontsize=9)


def draw_arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], curve: float = 0.0) -> None:
    style = {"arrowstyle": "->", "lw": 1.4, "color": "0.3", "connectionstyle": f"arc3,rad={curve}"}
    axes.annotate("", end, start, arrowprops=style)


def draw_round(axes: Axes) -> None:
    """Draw what is sent and what is done in one round."""
    axes.set(xlim=(-0.3, 15), ylim=(-0.4, 6.4))
    axes.axis("off")
    draw_box(axes, 4.6, 5.0, 5.0, 1.0, "server: the adapter, which is\nthe mean of what came back", "#dbe9f6")
    for number, name in enumerate(CLIENTS):
        left = 0.2 + 5.0 * number
        draw_box(
            axes,
            left,
            0.0,
            3.6,
            1.9,
            f"{name}\nits rows, which stay\nbase, frozen + adapter\n10 local steps",
            "#fdebd0",
        )
        there, here = 7.1 + 0.3 * (left - 5.3), left + 1.8  # at the server's box, at the client's
        draw_arrow(axes, (there - 0.35, 4.8), (here - 0.35, 2.15))
        draw_arrow(axes, (here + 0.35, 2.15), (there + 0.35, 4.8))
    axes.text(0.2, 4.2, "1. some of the clients\nare drawn, and sent\nthe adapter", fontsize=9, va="center")
    axes.text(
        14.6, 4.2, "3. they send theirs back,\nand the server takes\nthe mean", fontsize=9, va="center", ha="right"
    )
    axes.text(14.6, 2.45, "2. each trains it", fontsize=9, va="center", ha="right")


def draw_stage(axes: Axes) -> None:
    """Draw how a stage's submodel is made, and where that goes which it learns."""
    axes.set(xlim=(-0.6, 16), ylim=(-4.4, 18.4))
    axes.axis("off")
    draw_stack(axes, 0, [4] * 4, "16 layers, in\ngroups that are alike")
    draw_stack(axes, 5, [1] * 4, "a submodel: for each\ngroup one layer")
    draw_stack(axes, 10, [4] * 4, "the base, as it was, with\nan adapter on all layers")
    for group in range(4):
        axes.add_patch(Rectangle((6.75, group + 0.1), 0.3, 0.65, color=COLORS[group], ec="black", lw=0.8))
        for layer in range(4):
            axes.add_patch(
                Rectangle((11.75, 4 * group + layer + 0.1), 0.3, 0.65, color=COLORS[group], ec="black", lw=0.8)
            )
        draw_arrow(axes, (1.8, 4 * group + 0.5), (4.8, group + 0.4))
        draw_arrow(axes, (7.3, group + 0.4), (9.8, 4 * group + 1.8))
    draw_arrow(axes, (5.2, 4.3), (6.4, 4.3), curve=-1.2)
    axes.text(5.8, 7.0, "rounds: clients\ntrain its adapter", ha="center", fontsize=9)
    axes.text(3.2, 16.4, "grouping, fusion", ha="center", fontsize=9)
    axes.text(8.4, 16.4, "transfer", ha="center", fontsize=9)
    draw_arrow(axes, (12.4, 8.0), (14.4, 8.0))
    axes.text(14.5, 8.0, "the next\nstage, of\nmore layers", va="center", fontsize=9)


def main() -> None:
    """Draw both."""
    for name, draw in (("round", draw_round), ("stage", draw_stage)):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        draw(figure.subplots())
        figure.savefig(PICTURE.with_name(f"{name}.png"), dpi=110)


if __name__ == "__main__":
    main()
