"""What a relation does to a vector, forward and backward, without an autograd graph (Lerer et al. 2019, section 3).

Parameters of a relation are one row of a table. A vector has D numbers, its bias among them:

    none              v
    translation       v + b                  D
    diagonal          d * v                  D
    linear            A v                    D * D, rows of A
    affine            A v + b                D * D + D
    complex_diagonal  (p + iq) (a + ib)      D: real parts p, then imaginary parts q
    rotation          (cos t + i sin t) v    D / 2 angles
"""

import math
from typing import Any

import numpy as np

from puna.graph.config import Operator
from puna.sparse.compiled import kernel

NONE, TRANSLATION, DIAGONAL, LINEAR, AFFINE, COMPLEX, ROTATION = range(7)
CODES: dict[Operator, int] = {
    "none": NONE,
    "translation": TRANSLATION,
    "diagonal": DIAGONAL,
    "linear": LINEAR,
    "affine": AFFINE,
    "complex_diagonal": COMPLEX,
    "rotation": ROTATION,
}


def num_parameters(operator: Operator, dim: int) -> int:
    """Numbers that one relation has for one side."""
    sizes = (0, dim, dim, dim * dim, dim * dim + dim, dim, dim // 2)
    return sizes[CODES[operator]]


def identity(operator: Operator, dim: int) -> np.ndarray:
    """The parameters with which an operator leaves every vector as it is: where training begins."""
    row = np.zeros(num_parameters(operator, dim), np.float32)
    if operator == "diagonal":
        row[:] = 1
    elif operator == "complex_diagonal":
        row[: dim // 2] = 1
    elif operator in ("linear", "affine"):
        row[: dim * dim] = np.eye(dim, dtype=np.float32).ravel()
    return row


def turned(operator: Operator, dim: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Parameters (count, P) that turn each pair of numbers by a random angle (diagonal: each number's sign)."""
    if operator == "diagonal":
        return rng.choice(np.array([-1, 1], np.float32), (count, dim))
    angles = rng.uniform(-np.pi, np.pi, (count, dim // 2)).astype(np.float32)
    return angles if operator == "rotation" else np.concatenate([np.cos(angles), np.sin(angles)], 1)


@kernel
def operate(code: int, vectors: Any, relations: Any, table: Any, out: Any) -> None:
    """out[i] = vectors[i] under the operator of relations[i]; (N, D), (N,), (R, parameters), (N, D)."""
    dim = vectors.shape[1]
    half = dim // 2
    for i in range(relations.shape[0]):
        v, p, o = vectors[i], table[relations[i]], out[i]
        if code == NONE:
            for k in range(dim):
                o[k] = v[k]
        elif code == TRANSLATION:
            for k in range(dim):
                o[k] = v[k] + p[k]
        elif code == DIAGONAL:
            for k in range(dim):
                o[k] = v[k] * p[k]
        elif code == COMPLEX:
            for k in range(half):
                o[k] = v[k] * p[k] - v[half + k] * p[half + k]
                o[half + k] = v[half + k] * p[k] + v[k] * p[half + k]
        elif code == ROTATION:
            for k in range(half):
                cos, sin = np.float32(math.cos(p[k])), np.float32(math.sin(p[k]))
                o[k] = v[k] * cos - v[half + k] * sin
                o[half + k] = v[half + k] * cos + v[k] * sin
        else:
            for r in range(dim):
                row = p[r * dim : (r + 1) * dim]
                total = np.float32(0)
                for k in range(dim):
                    total += row[k] * v[k]
                o[r] = total + p[dim * dim + r] if code == AFFINE else total


@kernel
def operate_back(
    code: int, vectors: Any, relations: Any, table: Any, slots: Any, grads: Any, into: Any, parameters: Any
) -> None:
    """Add what `grads` (of `operate`'s result) means for the vectors to `into`, for the relations to `parameters`.

    parameters: (unique relations, numbers); slots[relation] is a relation's row of it.
    """
    dim = vectors.shape[1]
    half = dim // 2
    for i in range(relations.shape[0]):
        v, g, into_v = vectors[i], grads[i], into[i]
        p, into_p = table[relations[i]], parameters[slots[relations[i]]]
        if code == NONE:
            for k in range(dim):
                into_v[k] += g[k]
        elif code == TRANSLATION:
            for k in range(dim):
                into_v[k] += g[k]
                into_p[k] += g[k]
        elif code == DIAGONAL:
            for k in range(dim):
                into_v[k] += g[k] * p[k]
                into_p[k] += g[k] * v[k]
        elif code == COMPLEX:
            for k in range(half):
                into_v[k] += g[k] * p[k] + g[half + k] * p[half + k]
                into_v[half + k] += g[half + k] * p[k] - g[k] * p[half + k]
                into_p[k] += g[k] * v[k] + g[half + k] * v[half + k]
                into_p[half + k] += g[half + k] * v[k] - g[k] * v[half + k]
        elif code == ROTATION:
            for k in range(half):
                cos, sin = np.float32(math.cos(p[k])), np.float32(math.sin(p[k]))
                real = v[k] * cos - v[half + k] * sin
                imag = v[half + k] * cos + v[k] * sin
                into_v[k] += g[k] * cos + g[half + k] * sin
                into_v[half + k] += g[half + k] * cos - g[k] * sin
                into_p[k] += g[half + k] * real - g[k] * imag
        else:
            for r in range(dim):
                row, into_row = p[r * dim : (r + 1) * dim], into_p[r * dim : (r + 1) * dim]
                scale = g[r]
                for k in range(dim):
                    into_v[k] += scale * row[k]
                    into_row[k] += scale * v[k]
                if code == AFFINE:
                    into_p[dim * dim + r] += scale


@kernel
def add_n3(paired: bool, weight: Any, values: Any, weights: Any, grads: Any) -> None:
    """Add to `grads` those of N3 (Lacroix et al. 2018) of the first rows: weight x sum of weights[i] |x|^3.

    paired: |x| is the modulus of a complex number whose parts stand half a vector apart.
    """
    dim = values.shape[1]
    half = dim // 2
    for i in range(weights.shape[0]):
        if weights[i] == 0:
            continue
        v, g = values[i], grads[i]
        scale = np.float32(3 * weight * weights[i])
        if paired:
            for k in range(half):
                slope = scale * np.sqrt(v[k] * v[k] + v[half + k] * v[half + k])
                g[k] += slope * v[k]
                g[half + k] += slope * v[half + k]
        else:
            for k in range(dim):
                g[k] += scale * abs(v[k]) * v[k]
