"""What a device is, what it allows, and how fast a model runs on it. Imports nothing of ours."""
