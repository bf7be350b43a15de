"""Prints AMD's value and gradient against map size, in the paper's form and the scale-free one, as Markdown.

Inputs are ReLU of Gaussian noise, N = 2, C = 64, float64, seed 0.
"""
import torch
from torch.nn.functional import cosine_similarity

from mmkd_plugin.models.losses import AMDLoss

SIZES = [(4, 4), (8, 8), (16, 16), (28, 28), (56, 56), (100, 168)]


def measure(loss: AMDLoss, size: tuple[int, int]) -> tuple[float, torch.Tensor, float]:
    """Returns the value, the gradient in F_S, and the norm of F_S."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 64, *size, generator=generator, dtype=torch.float64).relu() for _ in range(2))
    value = loss(student.requires_grad_(), teacher)
    gradient, = torch.autograd.grad(value, student)
    return value.item(), gradient.flatten(), student.norm().item()


def main() -> None:
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


if __name__ == '__main__':
    main()
