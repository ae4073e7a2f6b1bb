"""Measuring a committee: metrics, disagreement, significance, shifted images."""
