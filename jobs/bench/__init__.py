"""Timings that anyone can rerun, as ratios in one run: the engines beside a training step and beside peers, the whole line, the index."""
