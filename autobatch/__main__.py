"""``python -m autobatch``, the same as the command ``autobatch``."""

from autobatch.cli import main

main()
