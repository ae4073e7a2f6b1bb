"""Run folders: options, checkpoints, exact resume, progress and stored scores."""
