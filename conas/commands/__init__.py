"""What the scripts of a space call."""
