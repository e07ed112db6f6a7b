"""``python -m taskvec_train``, as torchrun starts it."""

from __future__ import annotations

from taskvec_train.cli import main

if __name__ == "__main__":
    main()
