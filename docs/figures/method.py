"""Draws method.svg, the picture of the method in the README: python docs/figures/method.py"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

EXPERTS = {"helpfulness": "#d55e00", "safety": "#0072b2", "truthfulness": "#009e73"}


def box(axes, x, y, width, height, text, colour="#444444", fill="white", size=9, weight="normal"):
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.06", ec=colour, fc=fill, lw=1.4))
    axes.text(
        x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, weight=weight, color="#222222"
    )


def arrow(axes, start, end, colour="#444444", curve=0.0):
    style = dict(arrowstyle="-|>", mutation_scale=11, lw=1.3, color=colour, connectionstyle=f"arc3,rad={curve}")
    axes.add_patch(FancyArrowPatch(start, end, **style))


def main() -> None:
    figure, axes = plt.subplots(figsize=(11, 4.3))
    axes.set_xlim(0, 22)
    axes.set_ylim(0, 8.6)
    axes.axis("off")
    for x, title in (
        (0.3, "1  align three experts"),
        (7.5, "2  fuse: one mixture per layer"),
        (16.6, "3  align the fusion"),
    ):
        axes.text(x, 8.2, title, fontsize=11, weight="bold", color="#222222")
    box(axes, 0.3, 3.4, 1.9, 1.4, "one base\n(frozen)", fill="#eeeeee")
    for row, (task, colour) in enumerate(EXPERTS.items()):
        y = 6.2 - 2.4 * row
        box(axes, 3.6, y, 2.7, 1.3, f"{task}\nLoRA of the FFN", colour=colour)
        arrow(axes, (2.35, 4.1), (3.5, y + 0.65), colour)
        arrow(axes, (6.45, y + 0.65), (7.5, 4.1 + 0.5 * (1 - row)), colour)
    axes.add_patch(FancyBboxPatch((7.6, 0.7), 7.9, 6.9, boxstyle="round,pad=0.06", ec="#888888", fc="#fafafa", lw=1.2))
    box(axes, 8.0, 3.6, 1.5, 1.1, "token x", fill="#eeeeee")
    box(axes, 10.2, 6.1, 4.9, 1.1, "router: softmax, top-k → w", colour="#888888")
    for row, colour in enumerate(EXPERTS.values()):
        y = 4.75 - 1.0 * row
        box(axes, 11.0, y, 1.9, 0.62, f"h{'₁₂₃'[row]} low rank", colour=colour, size=8)
        arrow(axes, (13.0, y + 0.31), (13.75, 3.95), colour)
    box(axes, 13.8, 3.5, 1.35, 0.9, "Σ wᵢ hᵢ", size=8.5)
    box(
        axes,
        8.6,
        1.1,
        5.9,
        1.0,
        "base FFN, stored once: one pass\neach through W_gate, W_up, W_down",
        fill="#eeeeee",
        size=7,
    )
    arrow(axes, (9.6, 4.3), (10.9, 4.1))
    arrow(axes, (8.8, 4.8), (10.1, 6.5))
    arrow(axes, (12.6, 6.0), (14.3, 4.5), "#888888", curve=-0.1)
    arrow(axes, (10.6, 2.2), (11.5, 2.7))
    arrow(axes, (14.4, 3.4), (13.6, 2.2))
    box(axes, 16.7, 5.6, 4.9, 1.9, "L  =  L_SFT + λ · L_gate\n+ Σ γᵢ · driftᵢ", size=9)
    axes.text(
        16.7,
        4.9,
        "L_gate  =  −log q(task):  the router's mean\nprobability of the sample's own expert",
        fontsize=8.5,
        va="top",
        color="#222222",
    )
    axes.text(
        16.7,
        3.5,
        "driftᵢ  =  ‖ change of expert i\nsince fusion ‖_F, by Gram matrices",
        fontsize=8.5,
        va="top",
        color="#222222",
    )
    axes.text(
        16.7,
        2.1,
        "trained: router and experts\nfrozen: base FFN, attention, embeddings",
        fontsize=8.5,
        va="top",
        color="#222222",
    )
    arrow(axes, (15.65, 4.1), (16.6, 5.4))
    plt.rcParams["svg.hashsalt"] = "h3fusion"
    figure.savefig(Path(__file__).with_name("method.svg"), bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
