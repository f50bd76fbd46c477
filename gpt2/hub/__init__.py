"""Export and publication for others. May import every other package."""
