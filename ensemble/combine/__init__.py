"""Combining the predictions of a committee's members."""
