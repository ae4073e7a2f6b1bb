"""Recurrent cells for language models: the method on text, and its commands."""
