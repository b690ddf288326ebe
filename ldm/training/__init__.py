"""Training from the command line: flags, config merge, run folders, resume and the Trainer, as plain functions."""
