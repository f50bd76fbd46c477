"""Scaling laws: how the loss falls with the size of the model and the tokens that it is trained on."""
