"""Reading: data sets, and rows of token ids."""
