"""The packed engine: one forward pass for all texts and adapters of a batch, without padding."""

from taskvec.openmp import limit_spinning

limit_spinning()  # here, because this runs before any module of the package imports torch
