"""The packed engine: one forward pass for all texts and adapters of a batch, without padding."""

from taskvec.openmp import limit_spinning

limit_spinning()  # every module of this package imports torch, or is imported before it
