"""Export for other programs, and upload to the Hugging Face Hub. May import every other package."""
