"""Draws `images/tangent_space.svg`: what the factors can follow of a gradient.

    python docs/tangent_space.py

The matrices [[1, x], [y, x y]] are those of rank one whose first entry is 1: a surface
z = x y in space, B A for B = [1, y] and A = [1, x]. So everything here is computed;
LoRA's own step is that of the same product as (B / RATIO) (RATIO A), and its length
is arbitrary, as the learning rate is.
"""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

POINT = np.array([0.35, 0.2])
GRADIENT = np.array([0.75, 0.15, 0.95])
RATIO = 2.0
COLOURS = {"G": "#b3261e", "E": "#1a56b0", "LoRA": "#8a6d00"}


def surface(x, y):
    """The place of the matrix with A = [1, x] and B = [1, y]."""
    return np.array([x, y, x * y])


def main() -> None:
    """Writes the drawing; the same bytes each time."""
    mpl.rcParams["svg.hashsalt"] = "tangent"
    x, y = POINT
    at = surface(x, y)
    jacobian = np.array([[1, 0], [0, 1], [y, x]])
    closest = jacobian @ np.linalg.pinv(jacobian) @ GRADIENT  # E
    # Its step on A moves W by B Bᵀ G, its step on B by G Aᵀ A.
    sizes = np.diag([RATIO**-2, RATIO**2])
    lora = jacobian @ sizes @ jacobian.T @ GRADIENT
    lora *= 0.8 * np.linalg.norm(closest) / np.linalg.norm(lora)

    figure = plt.figure(figsize=(5.8, 4.4))
    axes = figure.add_axes((-0.14, -0.25, 1.3, 1.5), projection="3d", proj_type="ortho")
    axes.computed_zorder = False
    grid = np.meshgrid(np.linspace(-0.8, 1.3, 22), np.linspace(-0.75, 1.15, 20))
    axes.plot_wireframe(*surface(*grid), color="0.72", linewidth=0.5, zorder=1)
    corners = np.array([[-0.75, -0.65], [0.85, -0.65], [0.85, 0.9], [-0.75, 0.9]])
    plane = (at[:, None] + jacobian @ corners.T).T
    patch = axes.plot_trisurf(*plane.T, triangles=[[0, 1, 2], [0, 2, 3]], zorder=2)
    patch.set_facecolor((0.36, 0.55, 0.87, 0.3))
    patch.set_edgecolor("none")
    axes.plot(
        *np.vstack([plane, plane[:1]]).T, color="#5b7fb8", linewidth=0.8, zorder=3
    )

    for name, arrow in (("G", GRADIENT), ("E", closest), ("LoRA", lora)):
        colour = COLOURS[name]
        axes.quiver(
            *at, *arrow, color=colour, linewidth=2.2, zorder=5, arrow_length_ratio=0.09
        )
    foot = np.array([at + GRADIENT, at + closest]).T
    axes.plot(*foot, color=COLOURS["G"], linewidth=1, linestyle=(0, (3, 3)), zorder=4)
    axes.scatter(*at, color="black", s=24, zorder=9)

    def label(place, text, colour="black"):
        axes.text(*place, text, color=colour, fontsize=11, zorder=10)

    label(at + np.array([-0.07, -0.1, -0.04]), "W")
    label(at + GRADIENT + [0.03, 0, 0.05], "G", COLOURS["G"])
    label(at + closest + [0.06, 0.02, -0.08], "E", COLOURS["E"])
    label(at + lora + [-0.3, 0.1, 0.07], "LoRA's own", COLOURS["LoRA"])
    label(plane[0] + [-0.15, 0, -0.2], "the plane of all s (B a + b A)", "#3f67a8")
    label((-0.85, -0.75, 0.72), "all W0 + s B A", "0.45")
    axes.set_box_aspect((2.1, 1.9, 2.1), zoom=1.1)
    axes.view_init(elev=22, azim=-66)
    axes.set_axis_off()
    target = Path(__file__).parent / "images" / "tangent_space.svg"
    metadata = {"Date": None, "Creator": None}
    figure.savefig(target, metadata=metadata)


if __name__ == "__main__":
    main()
