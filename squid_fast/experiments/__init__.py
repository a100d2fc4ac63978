"""Programs that stand on the whole library: baselines, ablation, demo, diagnostics, benchmark."""
