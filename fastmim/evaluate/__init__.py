"""Looking at what an objective has learnt: pictures, validation loss, the curve, probes of frozen features."""
