"""Many networks: how members are combined into a committee, measured, reported and drawn."""
