"""AdamW, Muon and the learning rate schedule. May import the modules at the top."""
