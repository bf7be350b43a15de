"""Prints the value and gradient of AMD against the map size, in the paper's and the scale-free form, as Markdown.

Inputs are ReLU of Gaussian noise, N = 2, C = 64, float64, seed 0.
"""
import argparse
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.nn.functional import cosine_similarity

from mmkd_plugin.models.losses import AMDLoss

SIZES = [(4, 4), (8, 8), (16, 16), (28, 28), (56, 56), (100, 168)]


def measure(loss: AMDLoss, size: tuple[int, int]) -> tuple[float, torch.Tensor, float]:
    """Returns the value, the gradient with respect to F_S, and the norm of F_S."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 64, *size, generator=generator, dtype=torch.float64).relu() for _ in range(2))
    value = loss(student.requires_grad_(), teacher)
    gradient, = torch.autograd.grad(value, student)
    return value.item(), gradient.flatten(), student.norm().item()


def draw(path: Path) -> None:
    """Draws value and gradient of both forms against the number of positions."""
    figure = Figure((8, 3.6), dpi=110, layout='constrained')
    axes = figure.subplots(1, 2)
    positions = [height * width for height, width in SIZES]
    for label, loss in (("the paper's form", AMDLoss()), ('scale-free', AMDLoss(scale_free=True))):
        found = [measure(loss, size) for size in SIZES]
        axes[0].loglog(positions, [value for value, _, _ in found], 'o-', label=label)
        axes[1].loglog(positions, [float(gradient.norm()) * norm for _, gradient, norm in found], 'o-', label=label)
    for axis, label in zip(axes, ('value', 'norm of the gradient in F_S x norm of F_S')):
        axis.set(xlabel='positions of the map (HW)', ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--plot', type=Path, help='file for a plot of both against the map size')
    args = parser.parse_args()
    print('| map | paper: value | paper: gradient norm | scale-free: value | scale-free: gradient norm x feature norm '
          '| cosine of the scale-free gradients for m = 1.35 and m = 1 |')
    print('|---|---|---|---|---|---|')
    for size in SIZES:
        paper, paper_gradient, _ = measure(AMDLoss(), size)
        value, gradient, norm = measure(AMDLoss(scale_free=True), size)
        _, without_margin, _ = measure(AMDLoss(scale_free=True, margin=1.0), size)
        cosine = cosine_similarity(gradient, without_margin, dim=0).item()
        print(f'| {size[0]} x {size[1]} | {paper:.1e} | {paper_gradient.norm():.1e} | {value:.3f} '
              f'| {gradient.norm() * norm:.2f} | {cosine:.3f} |')
    if args.plot:
        draw(args.plot)


if __name__ == '__main__':
    main()
