"""Cells of other projects, read and written: one small module for each form, none of which runs what is in a file."""
