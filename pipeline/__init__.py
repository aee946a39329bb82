"""One machine's share of the work: from a shard of images to filter saliency profiles and their statistics.

The stages, in the only order in which they import each other, meet through files:

    sources -> samples -> filters, models -> saliency -> manifest -> units -> store -> profiler -> worker
                          filters -> statistics, saliency -> interventions

Nothing here imports Ray or FAISS, and `import pipeline` imports nothing at all.

Axes, used by every docstring of the project:

    N  samples          B  samples of one batch       C  classes
    F  filters          L  layers (4-D weights)       K  neighbours
    O  output channels of one layer, its filters      H, W  height and width in pixels

Symbols of the paper (Levin et al., 2022, "Where do Models go Wrong? Parameter-Space Saliency Maps for Explainability"):

    s(x, y)_i  |dL(x, y) / d theta_i|, parameter saliency (eq. 1)
    s̄_k        the mean of s over the weights of filter k, filter saliency: what a run stores
    mu, sigma  mean and standard deviation of s̄_k over the reference set D
    ŝ          (s̄ - mu) / sigma, standardised filter saliency (eq. 2): what an index holds
"""
