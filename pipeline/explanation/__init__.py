"""Explanations: what in an image made its filters fail. Pure mathematics, no files and no jobs.

    input_saliency   M_F of an image and some filters: which pixels decide that these failed (eq. 3 and 4)
    heat             a map as one number a pixel, and as it is drawn
    sanity           whether maps and profiles depend on what was learnt: layers randomised from the top down
"""
