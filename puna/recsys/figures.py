"""Figures of predicted click probabilities against what was clicked."""

import numpy as np
import numpy.typing as npt


def auc(scores: npt.NDArray[np.float32], labels: npt.NDArray[np.float32]) -> float:
    """Area under the ROC curve: the share of (clicked, not clicked) pairs in order, ties half; NaN without a pair."""
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    first = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
    sizes = np.diff(np.append(first, len(ranked)))
    ranks = np.empty(len(ranked))
    ranks[order] = np.repeat(first + (sizes + 1) / 2, sizes)
    clicked = labels > 0.5
    num, others = int(clicked.sum()), int((~clicked).sum())
    if not num or not others:
        return float("nan")
    return float((ranks[clicked].sum() - num * (num + 1) / 2) / (num * others))


def log_loss(logits: npt.NDArray[np.float32], labels: npt.NDArray[np.float32]) -> float:
    """Mean of -y log p - (1 - y) log(1 - p), from logits."""
    wide = logits.astype(np.float64)
    return float(np.mean(np.maximum(wide, 0) - wide * labels + np.log1p(np.exp(-np.abs(wide)))))


def base_log_loss(rate: float) -> float:
    """Log loss of who always predicts the rate of clicks."""
    return float(-rate * np.log(rate) - (1 - rate) * np.log1p(-rate)) if 0 < rate < 1 else float("nan")


def figures(logits: npt.NDArray[np.float32], labels: npt.NDArray[np.float32]) -> dict[str, float]:
    """loss (log loss), auc, ne (normalised entropy: log loss over that of the base rate), calibration (clicks that are
    predicted over clicks that were)."""
    rate = float(labels.mean())
    loss = log_loss(logits, labels)
    predicted = float((1 / (1 + np.exp(-logits.astype(np.float64)))).mean())
    return {
        "loss": loss,
        "auc": auc(logits, labels),
        "ne": loss / base_log_loss(rate),
        "calibration": predicted / rate if rate else float("nan"),
    }
