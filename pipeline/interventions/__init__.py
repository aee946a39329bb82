"""Interventions: filters turned off, or moved one step, and what becomes of the logits. Pure mathematics, no files and no jobs.

    choice       which filters of a sample: the most salient, the least, random ones
    watching     how a network uses its 4-D weights: which convolution is whose, and which BatchNorm follows it
    branching    one forward for many (image, intervention) branches; they share what comes before their first change
    pruning      filters turned off (figure 3)
    finetuning   one normalised gradient step on some filters, and its effect on other images (figure 6)
"""
