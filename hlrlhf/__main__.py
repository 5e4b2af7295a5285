"""`python -m hlrlhf` is `hlrlhf`."""

from hlrlhf.cli import main

main()
