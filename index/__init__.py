"""Neighbours by error mode: standardised, normalised filter saliency in FAISS, asked by image ID.

    from index import Run
    run = Run.open("runs/demo")
    run.neighbors("val:img_0042", k=10, within="v2")

Needs neither the command line, nor Ray, nor torch.
"""

from index.run import Run

__all__ = ["Run"]
