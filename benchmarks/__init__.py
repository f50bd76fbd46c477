"""Programs that measure speed and learning side by side with other implementations."""
