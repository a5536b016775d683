"""Which way a metric is better, by the words of its name."""

from __future__ import annotations

import re

LESS = frozenset(
    "loss losses error errors err wer cer ter mer eer ece ppl perplexity mae mse rmse mape smape rmsle msle nll bpb bpc "
    "bpt brier crps fid kid hamming kl divergence distance deviance regret latency toxicity hallucination "
    "hallucinations entropy".split()
)
MORE = frozenset(
    "accuracy acc f1 f2 fbeta precision recall sensitivity specificity auc auroc auprc roc mcc matthews kappa bleu "
    "sacrebleu rouge rouge1 rouge2 rougel rougelsum chrf meteor comet cider spice bertscore em exact match pearson "
    "pearsonr spearman spearmanr correlation r2 ndcg mrr map hits iou miou dice psnr ssim pass likelihood win".split()
)


def is_lower_better(metric: str) -> bool | None:
    """Return whether less of a metric is better: `eval_wer` yes, `macro_f1` no; None where its name does not say."""
    words = set(re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", metric).lower()))
    less, more = words & LESS, words & MORE
    if {"neg", "negative"} & words or bool(less) == bool(more):
        return None
    return bool(less)
