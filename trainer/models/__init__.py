"""Models: what a forward gives, how a checkpoint is loaded, how a model trains."""
