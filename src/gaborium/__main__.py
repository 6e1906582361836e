"""Run the command line as ``python -m gaborium``."""

from gaborium.cli import main

main()
