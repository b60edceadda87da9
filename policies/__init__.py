"""What decides: PPO, baselines; evaluation and trained artefacts."""
