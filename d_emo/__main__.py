"""``python -m d_emo VERB`` is ``d-emo VERB``."""

from d_emo.cli import main

main()
