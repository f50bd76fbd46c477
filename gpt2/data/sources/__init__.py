"""Files of a corpus, here or elsewhere, as documents. May import the modules at the top."""
