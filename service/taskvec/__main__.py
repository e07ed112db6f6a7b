"""Entry point of ``python -m taskvec``."""

from taskvec.cli.main import main

main()
