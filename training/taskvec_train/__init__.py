"""Training: distil a student from a teacher, train a LoRA adapter for each task, export them."""

from taskvec.openmp import limit_spinning

limit_spinning()  # before torch is imported
