"""Looking at what an objective has learnt: reconstruction pictures, validation loss, the loss curve."""
