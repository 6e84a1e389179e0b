"""Merges of LoRA experts by their singular vectors, exact on low rank: everything happens in a small core space.

Expert i changes a projection by D_i = s_i B_i A_i, (out, in), of rank r_i. With R = sum of r_i and the QR of all
s_i B_i side by side and of all A_i^T side by side,

    [s_1 B_1 ... s_n B_n] = Q_B [T_1 ... T_n],   [A_1^T ... A_n^T] = Q_A [S_1 ... S_n],   D_i = Q_B (T_i S_i^T) Q_A^T,

so that the singular values of the D_i, of their sum and of [D_1 ... D_n] are those of the cores C_i = T_i S_i^T, (R, R)
(Core Space, arXiv 2509.17786). Each merge is again an adapter of rank R at most. Everything runs in float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

REAL = 1e-10  # singular values below this part of the largest are rounding


@dataclass(frozen=True)
class CoreSpace:
    """One projection's changes: q_b (out, P), q_a (in, Q), cores: C_i (P, Q) of each expert."""

    q_b: Tensor
    q_a: Tensor
    cores: list[Tensor]

    @classmethod
    def of(cls, deltas: list[tuple[Tensor, Tensor, float]]) -> "CoreSpace":
        """deltas: (A (r, in), B (out, r), scaling) of each expert."""
        left = [scaling * b.double() for _, b, scaling in deltas]
        right = [a.double().T for a, _, _ in deltas]
        ranks = [b.shape[1] for b in left]
        (q_b, r_b), (q_a, r_a) = (torch.linalg.qr(torch.cat(side, dim=1)) for side in (left, right))
        parts = zip(r_b.split(ranks, dim=1), r_a.split(ranks, dim=1), strict=True)
        return cls(q_b, q_a, [b @ a.T for b, a in parts])

    def adapter(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """(A (R, in), B (out, R)) of the change Q_B left right Q_A^T; left (P, R), right (R, Q)."""
        return right @ self.q_a.T, self.q_b @ left


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, V^T) of a matrix, its real singular values only."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    real = s > REAL * s[:1]
    return u[:, real], s[real], vh[real]


def polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (or rows)."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def tsv_m(space: CoreSpace, scale: float) -> tuple[Tensor, Tensor]:
    """(A, B) of TSV-M (Gargiulo et al. 2024, arXiv 2412.00081): the experts' singular vectors side by side, made
    orthogonal to each other, with the experts' own singular values. Low rank leaves nothing to cut off."""
    us, ss, vhs = zip(*map(svd, space.cores), strict=True)
    left, right = polar(torch.cat(us, dim=1)), polar(torch.cat(vhs, dim=0))
    return space.adapter(left * (scale * torch.cat(ss)), right)


def iso_c(space: CoreSpace, scale: float) -> tuple[Tensor, Tensor]:
    """(A, B) of Iso-C (Marczak et al. 2025, arXiv 2502.04959): the sum of the changes with all its singular values
    replaced by their mean; over the real ones, where the paper's full-rank changes have no others."""
    u, s, vh = svd(sum(space.cores))
    return space.adapter(u * (scale * s.mean()), vh)


def knots_ties(spaces: list[CoreSpace], density: float, scale: float) -> list[tuple[Tensor, Tensor]]:
    """(A, B) per projection of KnOTS-TIES (Stoica et al. 2024, arXiv 2410.19735; https://github.com/gstoica27/KnOTS).

    [D_1 ... D_n] = U S [V_1 ... V_n]: the experts' S V_i, in one basis, are merged by TIES over the whole model.
    """
    lefts, aligned = [], []
    for space in spaces:
        u, s, vh = svd(torch.cat(space.cores, dim=1))
        lefts.append(u)
        parts = (s[:, None] * vh).split(space.q_a.shape[1], dim=1)  # S V_i in core space, each (k, Q)
        aligned.append([part @ space.q_a.T for part in parts])  # (k, in)
    shapes = [parts[0].shape for parts in aligned]
    vectors = torch.stack([torch.cat([x.flatten() for x in of_expert]) for of_expert in zip(*aligned, strict=True)])
    merged = scale * ties(vectors, density)
    rights = merged.split([shape.numel() for shape in shapes])
    return [
        (right.view(shape), space.q_b @ left)
        for space, left, right, shape in zip(spaces, lefts, rights, shapes, strict=True)
    ]


def ties(vectors: Tensor, density: float) -> Tensor:
    """TIES (Yadav et al. 2023, arXiv 2306.01708) of vectors (n, N) -> (N,): of each the `density` largest entries
    stay; of each entry the mean of those that have the sign of their sum."""
    count = max(1, int(density * vectors.shape[1]))
    least = vectors.abs().topk(count, dim=1).values[:, -1:]
    trimmed = torch.where(vectors.abs() >= least, vectors, 0)
    agree = (trimmed * trimmed.sum(0).sign() > 0).to(vectors.dtype)
    return (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)


def mean_cosine(spaces: list[CoreSpace]) -> float:
    """The mean cosine between two experts' changes of the whole model: 0 where they have nothing in common."""
    flat = [torch.stack([core.flatten() for core in space.cores]) for space in spaces]
    gram = sum(x @ x.T for x in flat)
    norms = gram.diagonal().sqrt()
    cosines = gram / (norms[:, None] * norms)
    return cosines[*torch.triu_indices(*gram.shape, offset=1)].mean().item()
