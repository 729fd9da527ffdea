"""``python -m anykvm``."""

from anykvm.cli import main

main()
