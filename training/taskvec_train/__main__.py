"""``python -m taskvec_train``, the entry point for torchrun."""

from __future__ import annotations

from taskvec_train.cli import main

if __name__ == "__main__":
    main()
