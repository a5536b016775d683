"""What a confirmation run measures beside its test metrics: forgetting, style of replies, sample answers."""
