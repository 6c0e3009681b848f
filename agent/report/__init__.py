"""What a run tells: evaluation, statistics, figures, callbacks."""
