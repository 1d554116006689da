"""The command line: `d-emo VERB`, `python -m d_emo VERB`, and the scripts of the checkout."""
