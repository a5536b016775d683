"""Metrics of your own: `task.extra_metrics=[my_metrics.py:negative_recall]`.

A metric takes what a task keeps of every example, as numpy arrays of equal length. Every task keeps `example`,
`loss_sum` and `weight`; text classification also `label`, `prediction` and `correct`, language modelling `tokens` and
`correct_tokens`.
"""

import numpy as np


def negative_recall(rows):
    """Share of the examples of the first label (tweets: negative) that were found."""
    first = rows["label"] == 0
    return np.mean(rows["prediction"][first] == 0) if first.any() else 0.0


def missed_by_far(rows):
    """Mean distance between label and prediction: negative taken for positive is worse than for neutral."""
    return np.mean(np.abs(rows["label"] - rows["prediction"]))


missed_by_far.lower_is_better = True
