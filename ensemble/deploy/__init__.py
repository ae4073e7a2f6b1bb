"""A committee for other programs: as plain operations, as files, and tried in the runtimes that are installed."""
