"""Small programs of the developers."""
